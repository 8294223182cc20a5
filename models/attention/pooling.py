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
from .local import DepthwiseConv

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
        self.conv = DepthwiseConv(shape, local_size) if local_size else None

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


def cell_means(x_BHND: Tensor, heads: Heads, cells: Cells) -> Tensor:
    """Return the means of each cell without padding, (B, H, cells, D); zero if a cell is all padding."""
    grid = without_prefix(without_padding(x_BHND, heads), heads.tokens())
    counts = cell_counts(heads, cells, x_BHND).transpose(2, 3)
    return _cell_sums(grid, heads.tokens(), cells) / counts.clamp_min(1)


def cell_counts(heads: Heads, cells: Cells, like: Tensor) -> Tensor:
    """Return the number of tokens in each cell without padding, (B or 1, 1, 1, cells)."""
    geometry = heads.tokens()
    if heads.key_mask is None:
        seen = like.new_ones(1, 1, geometry.num_patches, 1)
    else:
        seen = heads.key_mask[:, None, geometry.num_prefix :, None].to(like.dtype)
    return _cell_sums(seen, geometry, cells).transpose(2, 3)


def log_counts(heads: Heads, cells: Cells, like: Tensor) -> Tensor:
    """Return the log of the number of tokens of each key, (B or 1, 1, 1, P + cells), to add to its logits
    (proportional attention: Bolya et al. 2023, arXiv 2210.09461, eq. 1)."""
    num_prefix = heads.tokens().num_prefix
    if heads.key_mask is None:
        prefix = like.new_ones(1, 1, 1, num_prefix)
    else:
        prefix = heads.key_mask[:, None, None, :num_prefix].to(like.dtype)
    return torch.cat((prefix, cell_counts(heads, cells, like)), 3).log()


def mean_weights(geometry: Geometry, cells: Cells) -> Tensor:
    """Return the matrix of the means, (cells, n), in float32 on the CPU."""
    members = [_members(length, count) for length, count in zip(geometry.grid, cells, strict=True)]
    return torch.kron(*(each / each.sum(1, keepdim=True) for each in members))


def pooling_macs(geometry: Geometry, cells: Cells) -> int:
    """Return the multiply-adds of the means of one channel of one head."""
    (rows, columns), (height, width) = cells, geometry.grid
    return rows * width * (height + columns)


def _cell_sums(x_BHnD: Tensor, geometry: Geometry, cells: Cells) -> Tensor:
    """Sum along the rows, then along the columns: (B, H, cells, D)."""
    height, width = geometry.grid
    batch, heads, _, channels = x_BHnD.shape
    # torch's adaptive pooling has overlapping cells if they do not divide the grid.
    # In the layout of a layer the grid is a view, and a row of it has all heads.
    grid_BhwC = x_BHnD.transpose(1, 2).reshape(batch, height, -1)
    by_row = _members(height, cells[0], x_BHnD) @ grid_BhwC
    by_cell = _members(width, cells[1], x_BHnD) @ by_row.reshape(batch * cells[0], width, -1)
    sums: Tensor = by_cell.reshape(batch, -1, heads, channels).transpose(1, 2)
    return sums


def _members(length: int, count: int, like: Tensor | None = None) -> Tensor:
    """Return (count, length): 1 where a position is in a cell of this axis."""
    device = torch.device("cpu") if like is None else like.device
    dtype = torch.float32 if like is None else like.dtype
    cell = torch.arange(length, device=device) * count // length
    return (cell == torch.arange(count, device=device)[:, None]).to(dtype)
