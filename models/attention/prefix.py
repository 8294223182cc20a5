"""Exact attention of prefix tokens, for operators that approximate the rows of grid tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Heads
from .softmax import softmax_rows
from .terms import FirstRows, Term


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
