"""Tiled softmax: tiles of grid queries with the keys that they see, from static tables of token indices.

Windows, dilated windows and neighborhoods differ only in their tables. Each axis is cut separately; a tile of the grid
is a pair of cuts. Shape suffixes: T tiles, M queries of a tile, S keys of a tile, n grid tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .base import Geometry
from .kernels import precise
from .terms import Sparse, Term
from .tile_groups import by_groups, grouped_softmax

Cut: TypeAlias = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Along one axis: queries (a,), keys (b,), and which query sees which key (a, b)."""
Cutter: TypeAlias = Callable[[int, int, int], list[Cut]]
"""Return cuts for (length of the axis, window, dilation); each position is a query in exactly one cut."""
Table: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Queries (T, M) and keys (T, S) as tokens, `sees` (T, M, S), and the place (n,) of each grid token in (T M)."""


def blocks(length: int, window: int, dilation: int) -> list[Cut]:
    """Cut each residue class of `dilation` into windows of nearly equal size, at most `window` positions."""
    cuts = []
    for phase in _phases(length, dilation):
        for block in np.array_split(phase, -(-len(phase) // window)):
            cuts.append((block, block, np.ones((len(block), len(block)), dtype=bool)))
    return cuts


def neighbors(length: int, window: int, dilation: int) -> list[Cut]:
    """Give each position the `window` nearest positions of its residue class; at the ends the window moves inwards.

    This is NATTEN's definition (Hassani et al. 2023, arXiv 2204.07143; dilated: 2209.15001).
    """
    cuts = []
    for phase in _phases(length, dilation):
        size = len(phase)
        for block in np.array_split(np.arange(size), -(-size // max(window // 2 + 1, 2))):
            first = np.clip(block - window // 2, 0, max(size - window, 0))[:, None]
            halo = np.arange(first.min(), min(first.max() + window, size))
            cuts.append((phase[block], phase[halo], (first <= halo) & (halo < first + window)))
    return cuts


@lru_cache(maxsize=64)
def tile_arrays(cutter: Cutter, geometry: Geometry, window: int, dilation: int) -> tuple[NDArray[Any], ...]:
    """Return the table of these tiles as arrays. Prefix tokens are the first keys of every tile."""
    rows, columns = (cutter(length, window, dilation) for length in geometry.grid)
    tiles = [_tile(row, column, geometry) for row in rows for column in columns]
    most_queries, most_keys = (max(len(tile[part]) for tile in tiles) for part in (0, 1))
    queries = np.stack([np.pad(tile[0], (0, most_queries - len(tile[0])), mode="edge") for tile in tiles])
    keys = np.stack([np.pad(tile[1], (0, most_keys - len(tile[1])), mode="edge") for tile in tiles])
    # A padding query repeats the last query of its tile; no query sees a padding key.
    sees = np.stack(
        [
            np.pad(
                np.pad(sees, ((0, most_queries - len(tile)), (0, 0)), mode="edge"),
                ((0, 0), (0, most_keys - sees.shape[1])),
            )
            for tile, _, sees in tiles
        ]
    )
    place = np.empty(geometry.num_patches, dtype=np.int64)
    place[queries.ravel()[::-1] - geometry.num_prefix] = np.arange(queries.size)[::-1]
    return queries, keys, sees, place


def tile_table(cutter: Cutter, geometry: Geometry, window: int, dilation: int) -> Table:
    """Return `tile_arrays` as tensors on the CPU."""
    queries, keys, sees, place = tile_arrays(cutter, geometry, window, dilation)
    return tuple(torch.from_numpy(array.copy()) for array in (queries, keys, sees, place))  # type: ignore[return-value]


def tiled_softmax(
    q: Tensor, k: Tensor, v: Tensor, table: Table, *, scale: float, dropout: float = 0.0, masked: bool = True
) -> Tensor:
    """Return softmax attention of grid tokens over the keys of their tiles, (B, H, n, D), by torch's fused attention.

    `masked` is False if every query sees every key of its tile.
    """
    queries, keys, sees, place = table
    if dropout == 0 and by_groups(k, v, keys):
        out = grouped_softmax(q, k, v, queries, keys, sees if masked else None, scale)
        prefix = q.shape[2] - len(place)
        return out[:, :, prefix:] if prefix else out
    # The fused kernels take four dimensions: tiles are in the dimension of the heads.
    tiles = [gather(x, index).flatten(0, 1) for x, index in ((q, queries), (k, keys), (v, keys))]
    mask = sees.unsqueeze(0) if masked else None
    out = F.scaled_dot_product_attention(
        tiles[0], tiles[1], tiles[2], attn_mask=mask, dropout_p=dropout, scale=scale
    )
    tiled: Tensor = out.unflatten(0, q.shape[:2]).flatten(2, 3)
    return tiled.index_select(2, place)


def tile_logits(q: Tensor, k: Tensor, table: Table, scale: float) -> Tensor:
    """Return s q·k of each grid token and the keys of its tile, (B, H, n, S) in float32 or better; -inf if unseen."""
    queries, keys, sees, place = table
    products = precise(gather(q, queries)) @ precise(gather(k, keys)).transpose(3, 4)
    logits = (scale * products).masked_fill(~sees, -torch.inf)
    return logits.flatten(2, 3).index_select(2, place)


def sparse_term(weights_BHnS: Tensor, table: Table, num_prefix: int) -> Term:
    """Return the rows of the grid tokens as a term; the rows of prefix tokens are zero."""
    head = (0, 0, num_prefix, 0)
    return Sparse(F.pad(weights_BHnS, head), F.pad(token_keys(table), head))


def token_keys(table: Table) -> Tensor:
    """Return the keys (n, S) of each grid token."""
    queries, keys, _, place = table
    return keys[place // queries.shape[1]]


def gather(x_BHND: Tensor, index: Tensor) -> Tensor:
    """Return the tokens at `index` (T, M): (B, H, T, M, D)."""
    tiles: Tensor = x_BHND.index_select(2, index.flatten()).unflatten(2, tuple(index.shape))
    return tiles


def _phases(length: int, dilation: int) -> list[NDArray[Any]]:
    return [np.arange(first, length, dilation) for first in range(min(dilation, length))]


def _tile(row: Cut, column: Cut, geometry: Geometry) -> Cut:
    """Return the query tokens and key tokens of a pair of cuts, and which query sees which key."""
    prefix, width = geometry.num_prefix, geometry.grid[1]
    queries, keys = (prefix + (row[i][:, None] * width + column[i]).ravel() for i in (0, 1))
    sees = np.kron(row[2], column[2])
    return (
        queries,
        np.concatenate((np.arange(prefix), keys)),
        np.pad(sees, ((0, 0), (prefix, 0)), constant_values=True),
    )
