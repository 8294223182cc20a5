"""Attention to chosen blocks of tokens: exact softmax over the best blocks of keys, linear attention over the rest.

Blocks are windows of the grid of nearly equal size. Shape suffixes: B batch, H heads, N tokens, n grid tokens, P prefix
tokens, T blocks, M tokens of a block (padded to the largest), K chosen blocks, S keys of a query, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, did_you_mean
from .base import AttentionOperator, Geometry, Heads, LayerShape, LowRank, Sparse, Term, Traits, check_whole
from .kernel import EPSILON
from .kernels import precise
from .softmax import prefix_term, with_prefix
from .tiles import blocks, gather
from .window import TileTables

LINEAR = ("projected", "mixed", "none")
RARE = -2.197
"""The logit of 0.1."""


class Cut(NamedTuple):
    """The grid tokens by block: their numbers (T, M), which are no padding (T, M), and the place (n,) of each."""

    tokens: Tensor
    real: Tensor
    place: Tensor

    def by_token(self, x_BHTMD: Tensor) -> Tensor:
        """Return the grid tokens in their order, (B, H, n, D)."""
        return x_BHTMD.flatten(2, 3).index_select(2, self.place)


class BlockAttention(AttentionOperator):
    """A query sees the `share` of blocks of keys that suit its block best, by softmax, and the others by a kernel:

        o_i = softmax(s q_i·k_j over j ∈ C) v + [φ(q_i) Σ_{j∉C} φ(k_j)ᵀ v_j / φ(q_i)·Σ_{j∉C} φ(k_j)] W

    with φ the softmax over channels, and C the ⌊share T⌋ of T blocks of keys (at least one; of equal ones the first)
    whose means of keys have the largest products with the mean of the block's queries: SLA (Zhang et al. 2025,
    arXiv 2509.24006, without negligible blocks, as released). The released code takes the kernel over all keys, and one
    W with a bias for all heads; here, as in the paper, it is over the other keys; W is D x D a head and starts at zero.

    `block` is the largest side of a window of the grid. `linear` says what becomes of the kernel's part: "projected" as
    above, which has no map; "mixed": A = (1 - γ) A_softmax + γ A_kernel with γ = sigmoid(g) of each head, 0.1 at the
    start; "none": the chosen blocks alone. Prefix tokens are in C of every query, and attend exactly. If C has all
    blocks, the kernel has no keys, and A is the softmax.

    About 2 share N² D multiply-adds per head. No gradient goes through the choice.

    Raises ConfigError: an option is invalid.
    """

    def __init__(
        self, shape: LayerShape, block: int = 8, share: float = 0.1, linear: str = "projected"
    ) -> None:
        super().__init__(shape)
        check_whole("block", block)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ConfigError(f"plan: share={share}; give the share of blocks, a number from 0 to 1")
        if linear not in LINEAR:
            raise ConfigError(f"plan: linear={linear}; {did_you_mean(str(linear), LINEAR)}")
        self.tables = TileTables(blocks, shape.geometry, block, 1)
        self.part, self.linear = share, linear
        width = shape.head_dim
        if linear == "projected":
            self.projection = nn.Parameter(torch.zeros(shape.num_heads, width, width))
        elif linear == "mixed":
            self.gate = nn.Parameter(torch.full((shape.num_heads, 1, 1), RARE))

    @property
    def traits(self) -> Traits:
        mapped = self.linear != "projected"
        return Traits(linear_in_v=mapped, linear_cost=False, needs_grid=True)

    @property
    def why_no_map(self) -> str:
        return "" if self.traits.linear_in_v else "linear=projected mixes the channels of the kernel's part"

    def attend(self, heads: Heads) -> Tensor:
        cut, (q, k, v) = self._cut(heads), heads.qkv()
        q_BHTMD, k_BHTMD, v_BHTMD = (gather(x, cut.tokens) for x in (q, k, v))
        chosen = self._choose(q_BHTMD, k_BHTMD, cut)
        first = [x[:, :, : heads.tokens().num_prefix] for x in (k, v)]
        keys, values = (_pick(x, chosen, head) for x, head in zip((k_BHTMD, v_BHTMD), first, strict=True))
        sees = self._sees(cut, chosen, heads.tokens())
        parts = [x.flatten(0, 1) for x in (q_BHTMD, keys, values)]  # the fused kernels take four dimensions
        mask = None if sees is None else sees.flatten(0, 1)[:, :, None]
        exact = F.scaled_dot_product_attention(
            parts[0], parts[1], parts[2], attn_mask=mask, scale=heads.scale
        )
        out = cut.by_token(exact.unflatten(0, q.shape[:2]))
        if self.linear != "none":
            with torch.autocast(q.device.type, enabled=False):
                out = self._joined(out, q_BHTMD, k_BHTMD, v_BHTMD, chosen, cut)
        return with_prefix(heads, out.to(v.dtype))

    def terms(self, heads: Heads) -> list[Term]:
        if not self.traits.linear_in_v:
            return super().terms(heads)
        cut, geometry = self._cut(heads), heads.tokens()
        prefix, (q, k) = geometry.num_prefix, map(precise, heads.qk())
        q_BHTMD, k_BHTMD = (gather(x, cut.tokens) for x in (q, k))
        chosen = self._choose(q_BHTMD, k_BHTMD, cut)
        logits = heads.scale * q_BHTMD @ _pick(k_BHTMD, chosen, k[:, :, :prefix]).mT
        sees = self._sees(cut, chosen, geometry)
        weights = (logits if sees is None else logits.masked_fill(~sees[:, :, :, None], -torch.inf)).softmax(
            -1
        )
        index, head = self._columns(cut, chosen, prefix), (0, 0, prefix, 0)
        terms = [prefix_term(heads)] if prefix else []
        if self.linear == "mixed" and chosen.shape[-1] < len(cut.tokens):
            share, feature = self.gate.to(q.dtype).sigmoid(), partial(torch.softmax, dim=-1)
            left, right = feature(q_BHTMD), feature(k_BHTMD) * cut.real[..., None]
            _, z = self._sums(right, None, chosen)
            left = share[..., None] * left / (left @ z).clamp_min(EPSILON)
            near = left @ _pick(right, chosen, torch.zeros_like(k[:, :, :prefix])).mT
            weights = (1 - share[..., None]) * weights - near
            keys = F.pad(feature(k)[:, :, prefix:], head)
            terms.append(LowRank(F.pad(cut.by_token(left), head), keys))
        terms.append(Sparse(F.pad(cut.by_token(weights), head), F.pad(index, head), unique=True))
        return terms

    def rows(self, heads: Heads, index: Tensor) -> Tensor:
        rows = super().rows(heads, index)
        # Where an exact weight is tiny, the difference of terms can round to just below zero.
        return rows.clamp_min(0) if self.linear == "mixed" else rows

    def macs(self, geometry: Geometry) -> int:
        table, _ = self.tables(geometry, torch.device("cpu"))
        (num, size), width, prefix = map(int, table[0].shape), self.shape.head_dim, geometry.num_prefix
        chosen = self._count(num)
        exact = prefix * geometry.num_tokens + num * size * (prefix + chosen * size)
        total = 2 * exact * width + (num + 2 * size) * num * width
        if self.linear != "none" and chosen < num:
            total += num**2 * (width + 1) * width + num * size * (2 * width + 1) * width
            total += geometry.num_patches * width**2 * (self.linear == "projected")
        return total * self.shape.num_heads

    def resample(self, geometry: Geometry) -> None:
        super().resample(geometry)
        self.tables.fit(geometry)

    def _count(self, num_blocks: int) -> int:
        """Return how many blocks of keys a query sees exactly."""
        return max(1, int(self.part * num_blocks))

    def _cut(self, heads: Heads) -> Cut:
        geometry = heads.tokens()
        (tokens, _, sees, place), _ = self.tables(geometry, heads.known.device)
        return Cut(tokens, sees[:, 0, geometry.num_prefix :], place)

    def _choose(self, q_BHTMD: Tensor, k_BHTMD: Tensor, cut: Cut) -> Tensor:
        """Return the blocks of keys that the queries of each block see exactly, (B, H, T, K), in float32 or better."""
        with torch.no_grad(), torch.autocast(q_BHTMD.device.type, enabled=False):
            weight = cut.real.to(precise(q_BHTMD[:0]).dtype)
            weight = (weight / weight.sum(1, keepdim=True))[:, None]
            q, k = ((weight @ precise(x)).squeeze(3) for x in (q_BHTMD, k_BHTMD))
            scores, count = q @ k.mT, self._count(len(cut.tokens))
            if (
                torch.compiler.is_exporting()
            ):  # ONNX has no stable sort, and its TopK takes the first of equal ones
                return scores.topk(count).indices
            return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]

    def _sees(self, cut: Cut, chosen: Tensor, geometry: Geometry) -> Tensor | None:
        """Return which of the keys of a block are no padding, (B, H, T, S); None if all are."""
        if all(side % -(-side // self.tables.window) == 0 for side in geometry.grid):
            return None
        return F.pad(cut.real[chosen].flatten(3), (geometry.num_prefix, 0), value=True)

    def _columns(self, cut: Cut, chosen: Tensor, num_prefix: int) -> Tensor:
        """Return the keys of each grid token, (B, H, n, S)."""
        first = torch.arange(num_prefix, device=chosen.device).expand(*chosen.shape[:3], -1)
        index = torch.cat((first, cut.tokens[chosen].flatten(3)), 3)
        return index.index_select(2, cut.place // cut.tokens.shape[1])

    def _joined(
        self,
        exact_BHnD: Tensor,
        q_BHTMD: Tensor,
        k_BHTMD: Tensor,
        v_BHTMD: Tensor,
        chosen: Tensor,
        cut: Cut,
    ) -> Tensor:
        """Return the exact part together with the kernel's, (B, H, n, D)."""
        if chosen.shape[-1] == len(cut.tokens):
            return exact_BHnD
        q, k = (precise(x).softmax(-1) for x in (q_BHTMD, k_BHTMD))
        products, z = self._sums(k * cut.real[..., None], precise(v_BHTMD), chosen)
        kernel = cut.by_token((q @ products) / (q @ z).clamp_min(EPSILON))
        if self.linear == "projected":
            return precise(exact_BHnD) + kernel @ self.projection.to(kernel.dtype)
        share = self.gate.to(kernel.dtype).sigmoid()
        return torch.lerp(precise(exact_BHnD), kernel, share)

    def _sums(self, k_BHTMF: Tensor, v_BHTMD: Tensor | None, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ φ(k) vᵀ and Σ φ(k) over the blocks that were not chosen, (B, H, T, F, D) and (B, H, T, F, 1)."""
        ones = torch.ones(
            *chosen.shape[:2], *2 * k_BHTMF.shape[2:3], dtype=k_BHTMF.dtype, device=chosen.device
        )
        others = ones.scatter(3, chosen, 0.0)
        z = (others @ k_BHTMF.sum(3))[..., None]
        if v_BHTMD is None:
            return z, z
        products = k_BHTMF.mT @ v_BHTMD
        return (others @ products.flatten(3)).unflatten(3, products.shape[3:]), z


def _pick(x_BHTMD: Tensor, chosen_BHTK: Tensor, first_BHPD: Tensor) -> Tensor:
    """Return the prefix tokens and the tokens of the chosen blocks, (B, H, T, S, D)."""
    batch, heads, num, size, width = x_BHTMD.shape
    start = num * torch.arange(batch * heads, device=chosen_BHTK.device).view(batch, heads, 1, 1)
    rows = x_BHTMD.reshape(batch * heads * num, size * width)
    picked = rows.index_select(0, (chosen_BHTK + start).flatten()).view(batch, heads, num, -1, width)
    if not first_BHPD.shape[2]:
        return picked
    return torch.cat((first_BHPD[:, :, None].expand(-1, -1, num, -1, -1), picked), 3)


OPERATORS: dict[str, Callable[..., AttentionOperator]] = {
    "sla": BlockAttention,
    "topk": partial(BlockAttention, linear="none"),
}
