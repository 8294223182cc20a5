"""Parts of a map (N×N) of each head, in factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A part of a map: L Rᵀ, with `left` (B, H, rows, r) and `right` (B, H, N, r).

    Without `left`, L is the identity. Without `right`, `left` (B, H, N, 1) is the diagonal of the part.
    """

    left: Tensor | None
    right: Tensor | None


def combine(part: Part, x: Tensor) -> Part:
    """Return X times a part, for X (m × rows)."""
    if part.right is None:
        assert part.left is not None
        return Part(None, x.transpose(2, 3) * part.left)
    return Part(x if part.left is None else x @ part.left, part.right)


def weigh(part: Part, weights: Tensor | float) -> Part:
    """Return a part with its rows times `weights` (rows × 1), or all times a number."""
    if part.left is not None:
        return Part(part.left * weights, part.right)
    across = weights.transpose(2, 3) if isinstance(weights, Tensor) else weights
    assert part.right is not None
    return Part(None, part.right * across)


def apply_part(part: Part, v_BHND: Tensor) -> Tensor:
    """Return a part times values of any width."""
    if part.right is None:
        assert part.left is not None
        return part.left * v_BHND
    out = part.right.transpose(2, 3) @ v_BHND
    return out if part.left is None else part.left @ out


def without_values(part: Part) -> Part:
    """Return a part of the same form that is zero."""
    left, right = (None if x is None else torch.zeros_like(x) for x in (part.left, part.right))
    return Part(left, right)


def with_padding(part: Part, seen: Tensor) -> Part:
    """Return a part of the tokens that `seen` (N,) marks as a part of all N tokens, with zeros at the others."""

    def spread(x: Tensor) -> Tensor:
        out = x.new_zeros(*x.shape[:2], len(seen), x.shape[3])
        out[:, :, seen] = x
        return out

    if part.left is not None:
        return Part(spread(part.left), None if part.right is None else spread(part.right))
    assert part.right is not None
    return Part(None, spread(spread(part.right).transpose(2, 3)).transpose(2, 3))


def stack(images: Sequence[Part]) -> Part:
    """Return one part of a batch from the parts of its images, whose ranks may differ."""

    def joined(factors: list[Tensor]) -> Tensor | None:
        rank = max((x.shape[3] for x in factors), default=0)
        return torch.cat([F.pad(x, (0, rank - x.shape[3])) for x in factors]) if factors else None

    lefts = [part.left for part in images if part.left is not None]
    return Part(joined(lefts), joined([part.right for part in images if part.right is not None]))
