"""Pooled tokens: means over cells of the token grid, which operators use in place of the tokens.

A grid is cut into cells of nearly equal size. Each patch is in one cell, prefix tokens are in none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ConfigError, JsonDict
from .base import AttentionOperator, Geometry, Heads, LayerShape, without_prefix
from .kernel import without_padding
from .local import local_convolution

Cells: TypeAlias = tuple[int, int]
"""Rows and columns of cells."""


class PooledAttention(AttentionOperator):
    """An operator with at most `count` pooled tokens and a depthwise convolution of the values that starts at zero.

    Raises ConfigError: `count` is not between 1 and the number of patches, or `local_size` is neither odd nor 0 (no
    convolution).
    """

    def __init__(self, shape: LayerShape, option: str, count: int, local_size: int) -> None:
        super().__init__(shape)
        check_count(option, count, shape.geometry)
        self.option, self.count = option, count
        self.conv = local_convolution(shape, local_size)

    @property
    def sized_options(self) -> JsonDict:
        return {self.option: self.count}

    def cells(self, geometry: Geometry) -> Cells:
        return cells_of(self.count, geometry)

    def local(self, heads: Heads) -> Tensor | None:
        if self.conv is None:
            return None
        return self.conv(without_padding(heads.values(), heads), heads.tokens())

    def macs_beside(self, geometry: Geometry) -> int:
        """Return the multiply-adds of the exact prefix queries and of the convolution."""
        exact = 2 * geometry.num_prefix * geometry.num_tokens * self.shape.head_dim * self.shape.num_heads
        return exact + (0 if self.conv is None else self.conv.macs(geometry))


def default_count(geometry: Geometry, part: int, most: int) -> int:
    """Return one for each `part` patches, at most `most`, so that the cost stays linear in the patches."""
    return max(1, min(most, geometry.num_patches // part))


def check_count(option: str, value: int, geometry: Geometry) -> None:
    """Raise ConfigError unless `value` is a whole number from 1 to the number of patches."""
    patches = geometry.num_patches
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= patches:
        raise ConfigError(
            f"plan: {option}={value}; give a whole number from 1 to {patches}, all patches, or convert at a larger "
            "image size and resize the model"
        )


def cells_of(count: int, geometry: Geometry) -> Cells:
    """Choose at most `count` nearly square cells; one token per cell if the grid has at most `count` tokens."""
    height, width = geometry.grid
    if count >= height * width:
        return height, width
    rows = max(1, min(height, count, round(math.sqrt(count * height / width))))
    columns = min(width, count // rows)
    return min(height, count // columns), columns


class Pooling:
    """The cells of a grid, for tokens of the type and on the device of `like`.

    `counts` (B or 1, 1, cells, 1) are the numbers of tokens without padding.
    """

    def __init__(self, heads: Heads, cells: Cells, like: Tensor) -> None:
        self._heads, self._geometry = heads, heads.tokens()
        self._rows, self._columns = (
            _members(length, count, like) for length, count in zip(self._geometry.grid, cells, strict=True)
        )
        self.counts = self._counts(like)

    def means(self, x_BHND: Tensor) -> Tensor:
        """Return the means of each cell without padding, (B, H, cells, D); zero if a cell is all padding."""
        grid = without_prefix(without_padding(x_BHND, self._heads), self._geometry)
        return self._sums(grid) / self.counts.clamp_min(1)

    def log_counts(self) -> Tensor:
        """Return the log of the number of tokens of each key, (B or 1, 1, 1, P + cells), to add to its logits
        (proportional attention: Bolya et al. 2023, arXiv 2210.09461, eq. 1)."""
        counts, num_prefix = self.counts.transpose(2, 3), self._geometry.num_prefix
        if num_prefix == 0:
            return counts.log()
        if self._heads.key_mask is None:
            prefix = counts.new_ones(1, 1, 1, num_prefix)
        else:
            prefix = self._heads.key_mask[:, None, None, :num_prefix].to(counts.dtype)
        return torch.cat((prefix, counts), 3).log()

    def _counts(self, like: Tensor) -> Tensor:
        if self._heads.key_mask is None:
            return (self._rows.sum(1)[:, None] * self._columns.sum(1)).reshape(1, 1, -1, 1)
        return self._sums(self._heads.key_mask[:, None, self._geometry.num_prefix :, None].to(like.dtype))

    def _sums(self, x_BHnD: Tensor) -> Tensor:
        """Sum along the rows, then along the columns: (B, H, cells, D)."""
        height, width = self._geometry.grid
        batch, heads, _, channels = x_BHnD.shape
        # torch's adaptive pooling has overlapping cells if they do not divide the grid.
        # In the layout of a layer the grid is a view, and a row of it has all heads.
        grid_BhwC = x_BHnD.transpose(1, 2).reshape(batch, height, -1)
        by_row = self._rows @ grid_BhwC
        by_cell = self._columns @ by_row.reshape(batch * len(self._rows), width, -1)
        return by_cell.reshape(batch, -1, heads, channels).transpose(1, 2)


def mean_weights(geometry: Geometry, cells: Cells) -> Tensor:
    """Return the matrix of the means, (cells, n), in float32 on the CPU."""
    members = [_members(length, count) for length, count in zip(geometry.grid, cells, strict=True)]
    return torch.kron(*(each / each.sum(1, keepdim=True) for each in members))


def pooling_macs(geometry: Geometry, cells: Cells) -> int:
    """Return the multiply-adds of the means of one channel of one head."""
    (rows, columns), (height, width) = cells, geometry.grid
    return rows * width * (height + columns)


def _members(length: int, count: int, like: Tensor | None = None) -> Tensor:
    """Return (count, length): 1 where a position is in a cell of this axis."""
    device = torch.device("cpu") if like is None else like.device
    dtype = torch.float32 if like is None else like.dtype
    cell = torch.arange(length, device=device) * count // length
    return (cell == torch.arange(count, device=device)[:, None]).to(dtype)


# Softmax attention that forms its maps and keeps them for the gradient: few keys, few queries, or small windows.
#
# torch's fused kernels compute a map again for its gradient, and have no gradient for a bias. A map that is
# hardly larger than queries or keys is cheaper to keep. With P = softmax(s Q Kᵀ + bias), O = P V and the
# upstream gradient G,
#
#     dS = P ∘ (dP - rowsum(dP ∘ P)) with dP = G Vᵀ, dQ = s dS K, dK = s dSᵀ Q, dV = Pᵀ G, and colsum(dS) for the
#                bias.
#
# One piece of a map exists at a time besides those that are kept, in the cache of a CPU.
#
# Shape suffixes: B batch, H heads, N queries, M keys, D head width, Z maps.

CACHED = 3 * 2**16
"""The number of weights of a piece, which stays in the cache of a CPU."""


def small_map_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return softmax(s Q Kᵀ + bias) V, (B, H, N, D).

    `bias` is what `scaled_dot_product_attention` takes as its mask. It may need a gradient if it is (1, 1, 1, M).
    """
    if _forms_maps(q, k, v, bias):
        return _SmallMaps.apply(q, k, v, bias, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def can_form_maps(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether the maps can be formed piece by piece: eagerly on a CPU, in one type, float32 or float64."""
    plain = q.device.type == "cpu" and k.shape == v.shape and q.dtype == k.dtype == v.dtype
    plain = plain and q.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return plain and not torch.compiler.is_compiling()


def few(num_queries: int, num_keys: int, width: int) -> bool:
    """Return whether a map is at most twice as large as its queries or its keys."""
    return min(num_queries, num_keys) <= 2 * width


def form_map(q_ZND: Tensor, k_ZMD: Tensor, scale: float, bias_M: Tensor | None = None) -> Tensor:
    """Return softmax(s Q Kᵀ + bias), (Z, N, M)."""
    if bias_M is None:
        logits = scaled_bmm(q_ZND, k_ZMD.mT, scale)
    else:
        logits = torch.baddbmm(bias_M, q_ZND, k_ZMD.mT, alpha=scale)
    return logits.softmax(-1)


def scaled_bmm(x_ZNM: Tensor, y_ZMD: Tensor, scale: float) -> Tensor:
    """Return s X Y, (Z, N, D)."""
    product = x_ZNM.new_empty(len(x_ZNM), x_ZNM.shape[1], y_ZMD.shape[2])
    return product.baddbmm_(x_ZNM, y_ZMD, beta=0, alpha=scale)


def logits_gradient(map_ZNM: Tensor, grad_ZND: Tensor, v_ZMD: Tensor) -> Tensor:
    """Return dS, (Z, N, M)."""
    grad_map = torch.bmm(grad_ZND, v_ZMD.mT)
    return torch._softmax_backward_data(grad_map, map_ZNM, -1, map_ZNM.dtype)


class _Piece(NamedTuple):
    """Some heads of an image, and some of their queries."""

    image: int
    heads: slice
    queries: slice

    def of_queries(self, x_BHND: Tensor) -> Tensor:
        """Return a view of these queries, (Z, n, D)."""
        return x_BHND[self.image, self.heads, self.queries]

    def of_keys(self, x_BHMD: Tensor) -> Tensor:
        """Return a view of all keys of these heads, (Z, M, D)."""
        return x_BHMD[self.image, self.heads]


class _SmallMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        out, bias_M = torch.empty_like(q), None if bias is None else bias.flatten()
        kept, maps = _keeps_maps(q, k), []
        for piece in _pieces(q, k.shape[2]):
            weights = form_map(piece.of_queries(q), piece.of_keys(k), scale, bias_M)
            torch.bmm(weights, piece.of_keys(v), out=piece.of_queries(out))
            if kept:
                maps.append(weights)
        ctx.save_for_backward(q, k, v, bias, *maps)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, *maps = ctx.saved_tensors
        bias_M = None if bias is None else bias.flatten()
        grad_bias = torch.zeros_like(bias_M) if bias_M is not None and ctx.needs_input_grad[3] else None
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for index, piece in enumerate(_pieces(q, k.shape[2])):
            own_q, own_k, grad = piece.of_queries(q), piece.of_keys(k), piece.of_queries(grad_out)
            weights = maps[index] if maps else form_map(own_q, own_k, ctx.scale, bias_M)
            before = 1 if piece.queries.start else 0
            piece.of_keys(dv).baddbmm_(weights.mT, grad, beta=before)
            grad_logits = logits_gradient(weights, grad, piece.of_keys(v))
            piece.of_queries(dq).baddbmm_(grad_logits, own_k, beta=0, alpha=ctx.scale)
            piece.of_keys(dk).baddbmm_(grad_logits.mT, own_q, beta=before, alpha=ctx.scale)
            if grad_bias is not None:
                grad_bias += grad_logits.sum((0, 1))
        return dq, dk, dv, None if grad_bias is None else grad_bias.view_as(bias), None


def _forms_maps(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Return whether there is something to learn, and forming the maps is possible and faster."""
    learns_bias = bias is not None and bias.requires_grad
    learned = learns_bias or any(x.requires_grad for x in (q, k, v))
    if not learned or not torch.is_grad_enabled() or not can_form_maps(q, k, v):
        return False
    by_key = bias is None or (bias.numel() == k.shape[2] and bias.dtype is q.dtype)
    return by_key and (learns_bias or _keeps_maps(q, k))


def _keeps_maps(q_BHND: Tensor, k_BHMD: Tensor) -> bool:
    """Return whether the maps are small beside the projections, or one piece."""
    return few(*_sizes(q_BHND, k_BHMD)) or q_BHND.shape[:3].numel() * k_BHMD.shape[2] <= CACHED


def _sizes(q_BHND: Tensor, k_BHMD: Tensor) -> tuple[int, int, int]:
    return q_BHND.shape[2], k_BHMD.shape[2], q_BHND.shape[3]


def _pieces(q_BHND: Tensor, num_keys: int) -> Iterator[_Piece]:
    batch, heads, tokens, _ = q_BHND.shape
    together = max(1, min(heads, CACHED // (tokens * num_keys)))
    length = max(1, min(tokens, CACHED // num_keys))
    for image in range(batch):
        for head in range(0, heads, together):
            for start in range(0, tokens, length):
                yield _Piece(image, slice(head, head + together), slice(start, start + length))
