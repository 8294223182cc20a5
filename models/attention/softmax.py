"""Softmax attention, the reference for every other operator."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import (
    QKV,
    Accounting,
    AttentionOperator,
    FirstRows,
    Geometry,
    Heads,
    LayerShape,
    LowRank,
    Operations,
    Term,
    Traits,
)
from .kernels import precise


class Softmax:
    """softmax(s Q Kᵀ + bias) V, by torch's fused attention; the layer's own map, where it is not this softmax."""

    needs = QKV

    def __call__(self, heads: Heads) -> Tensor:
        q, k, v = heads.qkv()
        if heads.to_map is not None:
            maps = heads.to_map((heads.scale * q) @ k.transpose(-2, -1))
            return F.dropout(maps, heads.dropout) @ v
        # torch's own default differs from D ** -0.5 in the last bit; timm relies on the default.
        scale = None if heads.scale == q.shape[-1] ** -0.5 else heads.scale
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=_mask(heads), dropout_p=heads.dropout, scale=scale
        )


class SoftmaxAttention(AttentionOperator):
    """Softmax attention as an operator of a converted layer: 2 N² D multiply-adds per head."""

    @property
    def traits(self) -> Traits:
        return Traits(linear_cost=False, key_mask=True, bias=True, dropout=True, graph_any_grid=True)

    def attend(self, heads: Heads) -> Tensor:
        return Softmax()(heads)

    def terms(self, heads: Heads) -> list[Term]:
        return [FirstRows(softmax_rows(heads, slice(None)))]

    def rows(self, heads: Heads, index: Tensor) -> Tensor:
        return softmax_rows(heads, index)

    def macs(self, geometry: Geometry) -> int:
        return 2 * geometry.num_tokens**2 * self.shape.head_dim * self.shape.num_heads

    def operations(self, geometry: Geometry, accounting: Accounting = "true") -> Operations:
        scaled = self.shape.num_heads * geometry.num_tokens**2 if accounting == "published" else 0
        return Operations(self.macs(geometry) + scaled, self.macs(geometry))


def softmax_rows(heads: Heads, index: Tensor | slice) -> Tensor:
    """Return rows of softmax(s Q Kᵀ + bias), (B, H, S, N), in float32 or better."""
    q, k = heads.qk()
    logits = heads.scale * precise(q[:, :, index]) @ precise(k).transpose(2, 3)
    mask = _mask(heads)
    if mask is not None:
        mask = mask if mask.shape[-2] == 1 else mask[..., index, :]
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1)


def _mask(heads: Heads) -> Tensor | None:
    """Return the bias, with minus infinity at padding keys."""
    if heads.seen is None or heads.bias is None:
        return heads.bias if heads.seen is None else heads.seen
    return heads.bias.masked_fill(~heads.seen, -torch.inf)


# Exact attention of prefix tokens, for operators that approximate the rows of grid tokens.


def prefix_softmax(heads: Heads) -> Tensor:
    """Return the softmax attention of the prefix tokens to every token, (B, H, P, D)."""
    q, k, v = heads.qkv()
    first = q[:, :, : heads.tokens().num_prefix]
    return F.scaled_dot_product_attention(
        first, k, v, attn_mask=heads.seen, dropout_p=heads.dropout, scale=heads.scale
    )


def with_prefix(heads: Heads, grid_BHnD: Tensor) -> Tensor:
    """Return the exact attention of the prefix tokens, then `grid_BHnD`: (B, H, N, D)."""
    if heads.tokens().num_prefix == 0:
        return grid_BHnD
    return torch.cat((prefix_softmax(heads), grid_BHnD), 2)


def prefix_term(heads: Heads) -> Term:
    """Return the prefix rows of the softmax map as a term."""
    return FirstRows(softmax_rows(heads, slice(heads.tokens().num_prefix)))


# Softmax with a decay, and the difference of two softmaxes.


class ManhattanAttention(SoftmaxAttention):
    """softmax(s q_i·k_j + log γ · d(i, j)) with the Manhattan distance d of two patches on the grid, and one γ a head:
    the decay of RMT (Fan et al. 2024, arXiv 2309.11523) inside the softmax, as its authors released it.

    A prefix token has no place: its distance to every token is 0. log γ is learned: it starts at 0 in a conversion,
    where the map is the teacher's, and at RMT's log(1 - 2^(-2 - 4 h / H)) of head h with fresh weights. RMT's
    decomposition along rows and columns is left out. 2 N² D multiply-adds per head, and a bias (H, N, N).
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.log_decay = nn.Parameter(torch.zeros(shape.num_heads, 1, 1))

    @property
    def traits(self) -> Traits:
        return Traits(linear_cost=False, needs_grid=True, key_mask=True, bias=True, dropout=True)

    def attend(self, heads: Heads) -> Tensor:
        decayed = self._decayed(heads)
        if torch.is_grad_enabled() and self.log_decay.requires_grad:
            # The fused kernels have no gradient for a bias: torch would form the map, too, and take longer.
            maps, v = softmax_rows(decayed, slice(None)), heads.values()
            return F.dropout(maps.to(v.dtype), heads.dropout) @ v
        return super().attend(decayed)

    def terms(self, heads: Heads) -> list[Term]:
        return super().terms(self._decayed(heads))

    def rows(self, heads: Heads, index: Tensor) -> Tensor:
        return super().rows(self._decayed(heads), index)

    def start_fresh(self) -> None:
        place = torch.arange(self.shape.num_heads) / self.shape.num_heads
        self.log_decay.data[:, 0, 0] = torch.log1p(-(2.0 ** (-2 - 4 * place)))

    def _decayed(self, heads: Heads) -> Heads:
        """Return the heads with the decay in their bias."""
        q, _ = heads.qk()
        distance = manhattan_distances(heads.tokens(), q.device)
        bias = (self.log_decay * distance).to(q.dtype)[None]
        return heads.each(lambda x: x, bias if heads.bias is None else heads.bias + bias)


def manhattan_distances(geometry: Geometry, device: torch.device) -> Tensor:
    """Return the distances |Δrow| + |Δcolumn| of all tokens, (N, N); 0 where one is a prefix token."""
    axes = [torch.arange(side, device=device) for side in geometry.grid]
    rows, columns = ((axis[:, None] - axis).abs() for axis in axes)
    distance = rows[:, None, :, None] + columns[None, :, None, :]
    prefix = geometry.num_prefix
    return F.pad(distance.flatten(2).flatten(0, 1), (prefix, 0, prefix, 0))


class DifferentialAttention(SoftmaxAttention):
    """softmax(s q·k) - λ softmax(s (q W)·k): a second map takes noise out of the first.

    From Ye et al. 2025, arXiv 2410.05258. The paper's two maps read one half of the channels each, and a norm follows
    each head. Here the first map is the teacher's, so that a conversion starts from it: λ is one number a head and
    starts at 0, W is D x D and starts at the identity, and there is no norm. Rows sum to 1 - λ. 4 N² D multiply-adds
    per head.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.amount = nn.Parameter(torch.zeros(shape.num_heads, 1, 1))
        self.weight = nn.Parameter(torch.eye(shape.head_dim).repeat(shape.num_heads, 1, 1))

    @property
    def traits(self) -> Traits:
        first = super().traits
        return replace(first, nonnegative=False, row_stochastic=False)

    def attend(self, heads: Heads) -> Tensor:
        first, second = super().attend(heads), super().attend(self._second(heads))
        return first - self.amount.to(first.dtype) * second

    def terms(self, heads: Heads) -> list[Term]:
        return [FirstRows(self.rows(heads, torch.arange(heads.known.shape[2], device=heads.known.device)))]

    def rows(self, heads: Heads, index: Tensor) -> Tensor:
        first, second = softmax_rows(heads, index), softmax_rows(self._second(heads), index)
        return first - self.amount.to(first.dtype) * second

    def macs(self, geometry: Geometry) -> int:
        width = self.shape.head_dim
        return 2 * super().macs(geometry) + geometry.num_tokens * width**2 * self.shape.num_heads

    def _second(self, heads: Heads) -> Heads:
        q, k, v = heads.qkv()
        return heads.with_qkv(q @ self.weight.to(q.dtype), k, v)


# Uniform attention: every token takes the mean of all values.


class UniformAttention(AttentionOperator):
    """A = 1/N, without queries, keys or parameters: the lower baseline for other operators.

    Tokens still exchange their mean, so a network with it is more than MLPs on single tokens.
    """

    needs = ("v",)

    @property
    def traits(self) -> Traits:
        return Traits(key_mask=True, graph_any_grid=True)

    def attend(self, heads: Heads) -> Tensor:
        v = heads.values()
        if heads.key_mask is None:
            return v.mean(2, keepdim=True).expand_as(v)  # torch sums half precision in float32
        return (_weights(heads) * v).sum(2, keepdim=True).to(v.dtype).expand_as(v)

    def terms(self, heads: Heads) -> list[Term]:
        v, weights = heads.values(), _weights(heads)
        right = weights.expand(*v.shape[:3], 1).to(v.dtype)
        return [LowRank(torch.ones_like(right), right)]

    def macs(self, geometry: Geometry) -> int:
        return geometry.num_tokens * self.shape.head_dim * self.shape.num_heads


def _weights(heads: Heads) -> Tensor:
    """Return the weight of each key, (B or 1, 1, N, 1), in float32 or better: equal for all but padding."""
    v = heads.values()
    dtype = torch.promote_types(v.dtype, torch.float32)
    if heads.key_mask is None:
        return v.new_full((1, 1, v.shape[2], 1), 1 / v.shape[2], dtype=dtype)
    keys = heads.key_mask[:, None, :, None].to(dtype)
    return keys / keys.sum(2, keepdim=True)


OPERATORS = {
    "softmax": SoftmaxAttention,
    "manhattan": ManhattanAttention,
    "differential": DifferentialAttention,
    "uniform": UniformAttention,
}
