"""Which layers, heads and tokens of a teacher stand for which of a student."""

from __future__ import annotations

from dataclasses import dataclass

from ..attention.base import Heads
from ..families import Site
from .tape import Tape, take
from .tokens import TokenMatch, interpolate_tokens


@dataclass(frozen=True)
class LayerPair:
    """Indices, from 0, of a teacher block and of the student block that learns from it."""

    teacher: int
    student: int


@dataclass(frozen=True)
class HeadMap:
    """For each student head the teacher heads whose mean map is its target; None where it is left alone."""

    groups: tuple[tuple[int, ...] | None, ...]
    teacher_heads: int

    @property
    def student_heads(self) -> tuple[int, ...]:
        """The student heads that learn from the teacher."""
        return tuple(head for head, group in enumerate(self.groups) if group is not None)

    @property
    def targets(self) -> tuple[tuple[int, ...], ...]:
        """The teacher heads of each of `student_heads`."""
        return tuple(group for group in self.groups if group is not None)

    @property
    def is_identity(self) -> bool:
        """Head h learns from head h, for all heads of both models."""
        return self.groups == tuple((head,) for head in range(self.teacher_heads))

    @property
    def is_grouped(self) -> bool:
        """Some student head learns from the mean of several teacher heads."""
        return any(len(group) > 1 for group in self.targets)


@dataclass(frozen=True)
class Link:
    """One pair of layers: which heads and tokens of the teacher stand for which of the student."""

    pair: LayerPair
    heads: HeadMap
    tokens: TokenMatch
    teacher: Site
    student: Site

    @property
    def num_prefix(self) -> int:
        """How many prefix tokens the two have in common."""
        return len(self.tokens.student.prefix)

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
        return len(self.student_index) == len(self.heads.groups)

    def teacher_heads(self, tape: Tape) -> Heads:
        """Return the teacher's q, k, v in the student's order of heads and tokens."""
        index = None if self.heads.is_identity else self.teacher_index
        return take(self.resample(tape), index, self.tokens.teacher)

    def matched_student(self, heads: Heads) -> Heads:
        """Return the student's q, k, v for the heads and tokens that have a counterpart."""
        return take(heads, None if self.all_heads else self.student_index, self.tokens.student)

    def resample(self, tape: Tape) -> Heads:
        """Return the teacher's projections, in the student's grid."""
        heads, grids = tape.heads[self.pair.teacher], tape.grids
        if grids is None:
            return heads
        theirs, ours = grids.teacher[self.teacher.stage], grids.student[self.student.stage]
        if theirs == ours:
            return heads
        prefix = self.tokens.teacher.num_prefix
        return heads.each(lambda x: interpolate_tokens(x, prefix, theirs, ours), heads.bias)
