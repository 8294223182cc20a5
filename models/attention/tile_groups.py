"""Tiled softmax on a CPU, a few tiles at a time: gathered queries, keys and values stay in the cache.

Shape suffixes: B batch, H heads, N tokens, C = H D channels, T tiles, G tiles of a group, M queries of a tile, S keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels

CACHED = 2**20
"""The number of gathered elements of a group."""
MANY = 3 * 2**19
"""The number of gathered elements of the keys from which groups are faster."""


def by_groups(k_BHND: Tensor, v_BHND: Tensor, keys_TS: Tensor) -> bool:
    """Return whether `grouped_softmax` can run, eagerly on a CPU with values as wide as the keys, and is worth it.

    It is where the gathered keys are many.
    """
    batch, heads, _, width = k_BHND.shape
    many = batch * heads * width * keys_TS.numel() > MANY
    plain = k_BHND.device.type == "cpu" and k_BHND.shape == v_BHND.shape
    return many and plain and not torch.compiler.is_compiling()


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
    out: Tensor = _GroupedSoftmax.apply(q, k, v, queries_TM, keys_TS, sees_TMS, scale)
    return out


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
