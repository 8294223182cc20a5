"""Pooled tokens: means over cells of the token grid, which operators use in place of the tokens.

A grid is cut into cells of nearly equal size. Each patch is in one cell, prefix tokens are in none.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import ConfigError
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
        self.count = count
        self.conv = local_convolution(shape, local_size)

    def cells(self, geometry: Geometry) -> Cells:
        return cells_of(self.count, geometry)

    def local(self, heads: Heads) -> Tensor | None:
        if self.conv is None:
            return None
        local: Tensor = self.conv(without_padding(heads.values(), heads), heads.tokens())
        return local

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
        raise ConfigError(f"plan: {option}={value}; give a whole number from 1 to {patches}, all patches")


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
        sums: Tensor = by_cell.reshape(batch, -1, heads, channels).transpose(1, 2)
        return sums


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
