"""Tiled softmax: tiles of grid queries with the keys that they see, from static tables of token indices.

Windows, dilated windows and neighborhoods differ only in their tables. Each axis is cut separately; a tile of the grid
is a pair of cuts. Shape suffixes: T tiles, M queries of a tile, S keys of a tile, n grid tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .base import Geometry, Sparse, Term
from .kernels import precise

# Tiled softmax on a CPU, a few tiles at a time: gathered queries, keys and values stay in the cache.
#
# Shape suffixes: B batch, H heads, N tokens, C = H D channels, T tiles, G tiles of a group, M queries of a
# tile, S keys.

CACHED = 2**20
"""The number of gathered elements of a group."""
MANY = 3 * 2**19
"""The number of gathered elements of the keys from which groups are faster."""


def by_groups(k_BHND: Tensor, v_BHND: Tensor, keys_TS: Tensor) -> bool:
    """Return whether `grouped_softmax` can run, eagerly on a CPU with values as wide as the keys, and is worth it.

    It is where the gathered keys are many.
    """
    if torch.compiler.is_compiling():  # first: a comparison would bound the batch of an export
        return False
    batch, heads, _, width = k_BHND.shape
    many = batch * heads * width * keys_TS.numel() > MANY
    return many and k_BHND.device.type == "cpu" and k_BHND.shape == v_BHND.shape


def grouped_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries_TM: Tensor,
    keys_TS: Tensor,
    sees_TMS: Tensor | None,
    scale: float,
) -> Tensor:
    """Return softmax attention of the queries of each tile over its keys, (B, H, N, D), undefined at other tokens.

    `sees` is None if every query sees every key of its tile. A token may be a query twice in one tile, as padding.
    """
    q, k, v, _ = kernels.same_dtype(q, k, v, None)
    return _GroupedSoftmax.apply(q, k, v, queries_TM, keys_TS, sees_TMS, scale)


class _GroupedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: Tensor,
        keys: Tensor,
        sees: Tensor | None,
        scale: float,
    ) -> Tensor:
        flat = [_rows(x) for x in (q, k, v)]
        out = torch.empty_like(flat[0])
        all_lse = []
        for rows, columns, bias in _groups(q, queries, keys, sees):
            index = (rows, columns, columns)
            own_q, own_k, own_v = (_gather(x, each, q) for x, each in zip(flat, index, strict=True))
            tile_out, lse = kernels.forward(own_q, own_k, own_v, bias, scale)
            out.index_copy_(0, rows.flatten(), tile_out.transpose(1, 2).reshape(-1, out.shape[1]))
            all_lse.append(lse)
        out_BHND = _heads(out, q)
        ctx.save_for_backward(q, k, v, queries, keys, sees, out_BHND, torch.cat(all_lse))
        ctx.scale = scale
        return out_BHND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, queries, keys, sees, out, lse = ctx.saved_tensors
        flat = [_rows(x) for x in (q, k, v, out, grad_out)]
        grads = [torch.zeros_like(x, dtype=kernels.precise(x[:0]).dtype) for x in flat[:3]]
        first_TM1 = _first(queries)[:, None, :, None]
        start, num_tiles = 0, len(queries)
        for rows, columns, bias in _groups(q, queries, keys, sees):
            index = (rows, columns, columns, rows, rows)
            own_q, own_k, own_v, own_out, own_grad = (
                _gather(x, each, q) for x, each in zip(flat, index, strict=True)
            )
            stop = start + len(rows)
            tile = torch.arange(start, stop) % num_tiles
            grad = own_grad * first_TM1[tile]
            found = kernels.backward(grad, own_q, own_k, own_v, bias, own_out, lse[start:stop], ctx.scale)
            for total, each, tile_grad in zip(grads, index, found, strict=False):
                summand = tile_grad.transpose(1, 2).reshape(-1, total.shape[1])
                total.index_add_(0, each.flatten(), summand.to(total.dtype))
            start = stop
        dq, dk, dv = (_heads(total.to(q.dtype), q) for total in grads)
        return dq, dk, dv, None, None, None, None


def _groups(
    q_BHND: Tensor, queries_TM: Tensor, keys_TS: Tensor, sees_TMS: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield queries (G, M) and keys (G, S) as rows of all images, and the bias (G, H, M, S) of unseen keys."""
    batch, heads, tokens, width = q_BHND.shape
    offsets = tokens * torch.arange(batch)[:, None, None]
    rows, columns = ((index + offsets).flatten(0, 1) for index in (queries_TM, keys_TS))
    size = max(1, CACHED // (heads * width * (rows.shape[1] + 2 * columns.shape[1])))
    for start in range(0, len(rows), size):
        group = slice(start, start + size)
        yield rows[group], columns[group], _bias(q_BHND, sees_TMS, start, len(rows[group]))


def _bias(q_BHND: Tensor, sees_TMS: Tensor | None, start: int, size: int) -> Tensor | None:
    if sees_TMS is None:
        return None
    sees = sees_TMS[torch.arange(start, start + size) % len(sees_TMS)]
    bias = torch.zeros(sees.shape, dtype=q_BHND.dtype).masked_fill_(~sees, -torch.inf)
    return bias[:, None].expand(-1, q_BHND.shape[1], -1, -1)


def _first(queries_TM: Tensor) -> Tensor:
    """Return 1 where a query appears in its tile for the first time, 0 where it is padding."""
    new = queries_TM[:, 1:] != queries_TM[:, :-1]  # padding repeats the last query
    return torch.nn.functional.pad(new, (1, 0), value=True)


def _rows(x_BHND: Tensor) -> Tensor:
    """Return (B N, C): a view in the layout of a layer."""
    return x_BHND.transpose(1, 2).flatten(2).flatten(0, 1)


def _heads(rows: Tensor, like_BHND: Tensor) -> Tensor:
    batch, heads, tokens, _ = like_BHND.shape
    return rows.view(batch, tokens, heads, -1).transpose(1, 2)


def _gather(rows: Tensor, index_GM: Tensor, like_BHND: Tensor) -> Tensor:
    """Return the tokens of a group, (G, H, M, D)."""
    gathered = rows.index_select(0, index_GM.flatten())
    return gathered.view(*index_GM.shape, like_BHND.shape[1], -1).transpose(1, 2)


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
    return x_BHND.index_select(2, index.flatten()).unflatten(2, tuple(index.shape))


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
