"""What passes between teacher and student in one step, and its heads and tokens by their place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention.base import Heads


@dataclass
class Tape:
    """The teacher's side of a step by teacher layer, and the losses by student layer.

    While `active`, the student's operators read it; otherwise the student is an ordinary model. A copy, and what
    is pickled, is empty.
    """

    active: bool = False
    heads: dict[int, Heads] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        self.active = False
        self.heads.clear()
        self.outputs.clear()
        self.losses.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Tape, ())


def take(heads: Heads, head_index: list[int] | None, token_index: tuple[int, ...] | None) -> Heads:
    """Some heads and tokens of every tensor; None keeps them all, without a copy."""

    bias = heads.bias
    if bias is not None:
        bias = bias[(None,) * (4 - bias.dim())]
        bias = pick_dim(bias, 1, head_index if bias.shape[1] > 1 else None)
        bias = pick_dim(pick_dim(bias, 2, token_index), 3, token_index)
    return heads.each(lambda x: pick_dim(pick_dim(x, 1, head_index), 2, token_index), bias)


def spread_heads(x_BHND: Tensor, sizes: list[int]) -> Tensor:
    """Each head as often as it has teachers, so that it stands beside each of them."""
    if max(sizes) == 1:
        return x_BHND
    return pick_dim(x_BHND, 1, [head for head, size in enumerate(sizes) for _ in range(size)])


def average_heads(x_BEND: Tensor, sizes: list[int]) -> Tensor:
    """The mean over the teachers of each head; the inverse of `spread_heads`."""
    if max(sizes) == 1:
        return x_BEND
    return torch.stack([group.mean(1) for group in x_BEND.split(sizes, dim=1)], dim=1)


def pick_dim(x: Tensor, dim: int, index: list[int] | tuple[int, ...] | None) -> Tensor:
    """`x` at `index` along `dim`: a view where the index is a run, a copy otherwise."""
    if index is None:
        return x
    start = index[0]
    if list(index) == list(range(start, start + len(index))):
        return x.narrow(dim, start, len(index))
    return x.index_select(dim, torch.tensor(index, device=x.device))
