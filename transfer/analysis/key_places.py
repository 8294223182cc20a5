"""Where the keys of an attention layer lie on the token grid of its stage.

Shape suffixes: H heads, N tokens of the stage, M keys of a query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.attention.base import Geometry
from ...models.map_structure import SizeShiftedWindows as Size
from ...models.map_structure import Windows


@dataclass(frozen=True)
class Cells:
    """Reduced keys: each is made of a cell of tokens."""

    grid: Size
    """The rows and columns of the keys."""
    stride: Size | None
    """The rows and columns of a cell; None for cells that share the grid evenly, as adaptive pooling does."""

    def shares(self, tokens: Size) -> Tensor:
        """Return the part that each token has in each key, (M, N): rows sum to one."""
        strides: Size | tuple[None, None] = self.stride or (None, None)
        down, right = (
            _cover(keys, count, stride)
            for keys, count, stride in zip(self.grid, tokens, strides, strict=True)
        )
        return torch.kron(down, right)

    def extent(self, tokens: Size) -> tuple[float, float]:
        """Return the parts of the image's height and width that cells cover: remaining tokens are in none."""
        if self.stride is None:
            return 1.0, 1.0
        down, right = (
            keys * step / count for keys, step, count in zip(self.grid, self.stride, tokens, strict=True)
        )
        return down, right


@dataclass(frozen=True)
class KeyPlaces:
    """The keys of each query of a layer: all tokens, those of the query's window, or reduced keys."""

    geometry: Geometry
    """The tokens of the stage, which ask."""
    windows: Windows | None = None
    cells: Cells | None = None

    @property
    def grid(self) -> Size:
        """Return the rows and columns of a picture of a row of the map."""
        return self.geometry.grid if self.cells is None else self.cells.grid

    @property
    def extent(self) -> tuple[float, float]:
        """Return the parts of the image's height and width that this picture covers."""
        return (1.0, 1.0) if self.cells is None else self.cells.extent(self.geometry.grid)

    def window_tokens(self) -> Tensor:
        """Return the token of each key of each query, (N, M); -1 for a token of padding."""
        assert self.windows is not None
        numbers = torch.arange(self.geometry.num_patches, dtype=torch.float64).view(1, 1, -1, 1)
        by_window = self.windows.cut(numbers, numbers.new_full((1, 1, 1, 1), -1.0))
        of_queries = by_window.transpose(2, 3).expand(-1, -1, by_window.shape[2], -1)
        return self.windows.join(of_queries)[0, 0].long()

    def without_padding(self, weights: Tensor) -> Tensor:
        """Return weights (..., N, M) with zeros for tokens of padding, which are outside the image."""
        return weights if self.windows is None else weights * (self.window_tokens() >= 0).to(weights)

    def on_tokens(self, weights: Tensor) -> Tensor:
        """Return weights (..., N, M) by token, (..., N, N): that of a reduced key is shared evenly by its tokens."""
        if self.cells is not None:
            return weights @ self.cells.shares(self.geometry.grid).to(weights)
        if self.windows is None:
            return weights
        tokens = self.window_tokens().to(weights.device)
        whole = weights.new_zeros(*weights.shape[:-1], self.geometry.num_tokens)
        places = tokens.clamp_min(0).expand(weights.shape)
        return whole.scatter_add(-1, places, self.without_padding(weights))

    def distances(self) -> Tensor:
        """Return the Euclidean distance from each patch to the tokens of each of its keys, in patches, (N, M)."""
        apart = patch_distances(self.geometry)
        if self.cells is not None:
            return apart @ self.cells.shares(self.geometry.grid).to(apart).T
        return apart if self.windows is None else apart.gather(1, self.window_tokens().clamp_min(0))

    def picture(self, row: Tensor, query: int) -> Tensor:
        """Return the weights (M) of a query's keys as a grid (rows, columns), without prefix tokens."""
        if self.windows is not None:
            tokens = self.window_tokens()[query]
            whole = row.new_zeros(self.geometry.num_patches)
            row = whole.scatter_add(0, tokens.clamp_min(0), row * (tokens >= 0).to(row))
        return row[self.geometry.num_prefix :].reshape(self.grid)


def patch_distances(geometry: Geometry) -> Tensor:
    """Return the Euclidean distances between the patches of a grid, (P, P), in patches."""
    height, width = geometry.grid
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    return torch.cdist(places, places)


def _cover(keys: int, tokens: int, stride: int | None) -> Tensor:
    """Return the part of each token of a line in each key of it, (keys, tokens)."""
    found = torch.zeros(keys, tokens, dtype=torch.float64)
    for key in range(keys):
        start = key * tokens // keys if stride is None else key * stride
        stop = -(-(key + 1) * tokens // keys) if stride is None else start + stride
        found[key, start:stop] = 1 / (stop - start)
    return found
