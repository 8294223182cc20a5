"""What passes between teacher and student in one step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...models.attention.base import Heads
from .heads import HeadMap
from .pairs import LayerPair
from .tokens import TokenMatch, interpolate_tokens


@dataclass
class Tape:
    """The teacher's side of a step by teacher layer, and the losses by student layer.

    While `active`, the student's operators read it; otherwise the student is an ordinary model.
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


@dataclass(frozen=True)
class GridChange:
    """Patch grids to interpolate the teacher's queries and keys between."""

    num_prefix: int
    teacher: tuple[int, int]
    student: tuple[int, int]


@dataclass(frozen=True)
class Link:
    """One pair of layers: which heads and tokens of the teacher stand for which of the student."""

    pair: LayerPair
    heads: HeadMap
    tokens: TokenMatch
    student_heads: int
    num_prefix: int
    grid: GridChange | None = None

    @property
    def teacher_index(self) -> list[int]:
        """The teacher heads in use, those of one student head in a row."""
        return [head for group in self.heads.targets for head in group]

    @property
    def student_index(self) -> list[int]:
        return list(self.heads.student_heads)

    @property
    def sizes(self) -> list[int]:
        """How many teacher heads are averaged for each student head in use."""
        return [len(group) for group in self.heads.targets]

    @property
    def all_heads(self) -> bool:
        return len(self.student_index) == self.student_heads

    def teacher_heads(self, tape: Tape) -> Heads:
        """The teacher's q, k, v in the student's order of heads and tokens."""
        heads = tape.heads[self.pair.teacher]
        index = None if self.heads.is_identity else self.teacher_index
        return take(self.resample(heads), index, self.tokens.teacher)

    def matched_student(self, heads: Heads) -> Heads:
        """The student's q, k, v for the heads and tokens that have a counterpart."""
        return take(heads, None if self.all_heads else self.student_index, self.tokens.student)

    def resample(self, heads: Heads) -> Heads:
        if self.grid is None:
            return heads
        grid = self.grid
        return heads.each(
            lambda x: interpolate_tokens(x, grid.num_prefix, grid.teacher, grid.student), heads.bias
        )


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
