"""The tensors that pass from teacher to student in one step, and the choice of their heads and tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.base import Heads
from ..families import Site
from .grids import Grids, TokenMatch, Tokens, interpolate_tokens, pick_dim


@dataclass
class Step:
    """What one forward pass of a student reads: the teacher's side by teacher layer, and shared drop-path masks."""

    grids: Grids | None = None
    """The grids of its images."""
    heads: dict[int, Heads] = field(default_factory=dict)
    """Queries, keys and values of attention layers."""
    outputs: dict[int, Tensor] = field(default_factory=dict)
    """P V of attention layers (B, H, N, D), before the output projection."""
    blocks: dict[int, Tensor] = field(default_factory=dict)
    """Tokens (B, N, C) after blocks."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Results of the whole teacher, by the names of `teacher_view.WHOLE`."""
    masks: dict[int, Tensor] = field(default_factory=dict)
    filled: Tensor | None = None
    """The shares (B, 2) of the rows and columns that the images fill, of a batch that is padded."""

    def convert(self, dtype: torch.dtype) -> None:
        """Give the teacher's side another type."""
        for layer, heads in self.heads.items():
            bias = None if heads.bias is None else heads.bias.to(dtype)
            self.heads[layer] = heads.each(lambda x: x.to(dtype), bias)
        for layer, out in self.outputs.items():
            self.outputs[layer] = out.to(dtype)
        for block, tokens in self.blocks.items():
            self.blocks[block] = tokens.to(dtype)
        for name, result in self.whole.items():
            self.whole[name] = result.to(dtype)


@dataclass(frozen=True)
class StepMoment:
    """The step in which a tape is."""

    tape: Tape
    step: Step | None

    def is_now(self) -> bool:
        return self.tape.step is self.step

    def again(self) -> AbstractContextManager[None]:
        return self.tape.replay(self.step)


class Tape(threading.local):
    """The step that the student's layers run in, and what they give: losses by name, inputs of its heads.

    Without a step the student is an ordinary model. Each thread has a step of its own. A copy, and what is pickled, is
    empty.
    """

    def __init__(self, step: Step | None = None) -> None:
        self.step = step
        self.losses: dict[str, Tensor] = {}
        self.features: dict[str, Tensor] = {}
        self.replaying = False

    @property
    def active(self) -> bool:
        return self.step is not None

    @property
    def grids(self) -> Grids | None:
        return self._step.grids

    @property
    def heads(self) -> dict[int, Heads]:
        return self._step.heads

    @property
    def outputs(self) -> dict[int, Tensor]:
        return self._step.outputs

    @property
    def blocks(self) -> dict[int, Tensor]:
        return self._step.blocks

    @property
    def whole(self) -> dict[str, Tensor]:
        return self._step.whole

    @property
    def masks(self) -> dict[int, Tensor]:
        return self._step.masks

    def convert(self, dtype: torch.dtype) -> None:
        """Give the teacher's side another type."""
        self._step.convert(dtype)

    @property
    def _step(self) -> Step:
        assert self.step is not None
        return self.step

    def begin(self, grids: Grids | None = None) -> None:
        """Begin a step; what the step before gave is forgotten here, and kept where its backward pass needs it."""
        self.step, self.losses, self.features = Step(grids), {}, {}

    def take(self, given: Step) -> None:
        """Let the teacher's side of this step be what `given` has."""
        own = self._step
        own.heads, own.outputs = dict(given.heads), dict(given.outputs)
        own.blocks, own.whole = dict(given.blocks), dict(given.whole)

    def fill(self, shares: Tensor) -> None:
        """Say how much of the rows and columns of the batch its images fill (B, 2)."""
        self._step.filled = shares

    def end(self) -> None:
        """Leave the step: the student is an ordinary model again."""
        self.step, self.losses, self.features = None, {}, {}

    def inside(self, link: Link) -> Tensor | None:
        """Return which of the student's tokens that `link` matches begin in their image (B, N); None without padding.

        Prefix tokens are of the whole image.
        """
        filled = self._step.filled
        if filled is None or self.grids is None:
            return None
        sides = [
            torch.arange(side, device=filled.device) / side for side in self.grids.student[link.student.stage]
        ]
        rows, columns = (side < share[:, None] for side, share in zip(sides, filled.unbind(1), strict=True))
        patches = (rows[:, :, None] & columns[:, None]).flatten(1)
        tokens = F.pad(patches, (link.tokens.student.num_prefix, 0), value=True)
        return link.tokens.student.pick(tokens, 1)

    def record(self, name: str, loss: Tensor) -> None:
        """Keep a loss under its name; the loss of a layer that is run again is known."""
        if not self.replaying:
            self.losses[name] = loss

    @property
    def moment(self) -> StepMoment:
        return StepMoment(self, self.step)

    @contextmanager
    def replay(self, step: Step | None) -> Iterator[None]:
        """Within it, layers run again as they did in `step`."""
        before = self.step, self.replaying
        self.step, self.replaying = step, True
        try:
            yield
        finally:
            self.step, self.replaying = before

    def __reduce__(self) -> tuple[Any, ...]:
        return (Tape, ())


@dataclass(eq=False)
class KeepOutput:
    """A forward hook of a module of the student: its output is kept among the features of the step, by `name`."""

    tape: Tape
    name: str

    def __call__(self, module: nn.Module, inputs: object, out: Tensor) -> None:
        if self.tape.active:
            self.tape.features[self.name] = out


def take(heads: Heads, head_index: list[int] | None, tokens: Tokens) -> Heads:
    """Some heads and tokens of every tensor; None keeps all heads, without a copy."""

    bias = heads.bias
    if bias is not None:
        bias = bias[(None,) * (4 - bias.dim())]
        bias = pick_dim(bias, 1, head_index if bias.shape[1] > 1 else None)
        bias = tokens.pick(tokens.pick(bias, 2), 3)
    return heads.each(lambda x: tokens.pick(pick_dim(x, 1, head_index), 2), bias)


def spread_heads(x_BHND: Tensor, sizes: list[int]) -> Tensor:
    """Repeat each head once for each of its teachers."""
    if max(sizes) == 1:
        return x_BHND
    return pick_dim(x_BHND, 1, [head for head, size in enumerate(sizes) for _ in range(size)])


def average_heads(x_BEND: Tensor, sizes: list[int]) -> Tensor:
    """Return the mean over the teachers of each head; the inverse of `spread_heads`."""
    if max(sizes) == 1:
        return x_BEND
    return torch.stack([group.mean(1) for group in x_BEND.split(sizes, dim=1)], dim=1)


# Which layers, heads and tokens of a teacher stand for which of a student.


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
