"""The terms of effective maps: A = Σ terms, none of them N x N."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from .base import Heads


@dataclass
class LowRank:
    """L Rᵀ, with `left` (B, H, N, r) and `right` (B, H, N, r)."""

    left: Tensor
    right: Tensor


@dataclass
class Sparse:
    """Row i has `weights` (B, H, N, S) at the columns `index` (N, S); a column may repeat."""

    weights: Tensor
    index: Tensor


@dataclass
class FirstRows:
    """The first P rows, dense, (B, H, P, N): prefix tokens that attend exactly."""

    weights: Tensor


Term: TypeAlias = LowRank | Sparse | FirstRows


def term_rows(term: Term, index: Tensor, heads: Heads) -> Tensor:
    """Return rows `index` (S,) of a term, (B, H, S, N)."""
    if isinstance(term, LowRank):
        return term.left[:, :, index] @ term.right.transpose(2, 3)
    weights = term.weights
    batch, num_heads, tokens = *weights.shape[:2], heads.known.shape[2]
    rows = weights.new_zeros(batch, num_heads, len(index), tokens)
    if isinstance(term, Sparse):
        columns = term.index[index].expand(batch, num_heads, -1, -1)
        return rows.scatter_add(3, columns, weights[:, :, index])
    rows[:, :, index < weights.shape[2]] = weights[:, :, index[index < weights.shape[2]]]
    return rows
