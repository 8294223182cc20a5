"""The operators that a hosted student layer runs while it is taught; alone, each is plain softmax attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.attention.base import QKV, Heads
from ...models.attention.fused import apply_map, attention_with_lse
from ...models.attention.softmax import Softmax
from .map_loss import MapLoss
from .tape import Link, Tape, average_heads, pick_dim, spread_heads

Part = Literal["q", "k", "v"]
softmax = Softmax()


@dataclass
class Taught(ABC):
    """A student operator: what it does with the teacher's layer, and plain softmax when no teacher ran."""

    link: Link
    tape: Tape

    @property
    def needs(self) -> Collection[str]:
        return self.taught_needs if self.tape.active else QKV

    @property
    def taught_needs(self) -> Collection[str]:
        return QKV

    def __call__(self, heads: Heads) -> Tensor:
        return self.taught(heads) if self.tape.active else softmax(heads)

    @abstractmethod
    def taught(self, heads: Heads) -> Tensor:
        """The layer's attention while the teacher's side is on the tape."""

    def record(self, loss: Tensor) -> None:
        self.tape.losses[self.link.pair.student] = loss


@dataclass
class CopyMap(Taught):
    """The teacher's map applied to the student's values: softmax(s_t Q_t K_tᵀ) V_s.

    Student heads that are not copied, and student tokens that the teacher does not have, attend by the
    student's own map; only for them are its queries and keys computed.
    """

    @property
    def taught_needs(self) -> Collection[str]:
        return ("v",) if self.link.all_heads and not self.link.tokens.student_only else QKV

    def taught(self, heads: Heads) -> Tensor:
        link, teacher = self.link, self.link.teacher_heads(self.tape)
        assert heads.v is not None
        assert teacher.q is not None
        assert teacher.k is not None
        values = pick_dim(heads.v, 1, None if link.all_heads else link.student_index)
        values = spread_heads(pick_dim(values, 2, link.tokens.student), link.sizes)
        copied = average_heads(
            apply_map(teacher.q, teacher.k, values, teacher.scale, teacher.bias), link.sizes
        )
        if "q" not in self.taught_needs:
            return copied
        own = softmax(heads)
        return blend(link, copied, own)


@dataclass
class CopyProjection(Taught):
    """The teacher's queries, keys or values in place of the student's; the rest is the student's own."""

    part: Part = "q"

    @property
    def taught_needs(self) -> Collection[str]:
        if self.link.all_heads and not self.link.tokens.student_only:
            return [part for part in QKV if part != self.part]
        return QKV

    def taught(self, heads: Heads) -> Tensor:
        copied = getattr(self.link.teacher_heads(self.tape), self.part)
        own = getattr(heads, self.part)
        mixed = copied if own is None else blend(self.link, copied, own)
        other = heads.v if self.part != "v" else heads.q
        assert other is not None
        mixed = mixed.to(other.dtype)
        return softmax(
            Heads(
                q=mixed if self.part == "q" else heads.q,
                k=mixed if self.part == "k" else heads.k,
                v=mixed if self.part == "v" else heads.v,
                bias=heads.bias,
                scale=heads.scale,
                dropout=heads.dropout,
            )
        )


@dataclass
class DistillMap(Taught):
    """The student's own attention, and the cross-entropy of its map to the teacher's."""

    loss: MapLoss = field(default_factory=MapLoss)

    def taught(self, heads: Heads) -> Tensor:
        link, teacher = self.link, self.link.teacher_heads(self.tape)
        lse = None
        if self.loss.needs_own_rows or link.tokens.student is not None:
            out = softmax(heads)
        else:
            assert heads.q is not None
            assert heads.k is not None
            assert heads.v is not None
            out, lse = attention_with_lse(heads.q, heads.k, heads.v, heads.scale, heads.bias)
            lse = pick_dim(lse, 1, None if link.all_heads else link.student_index)
        self.record(
            self.loss(
                link.matched_student(heads),
                teacher,
                sizes=link.sizes,
                num_prefix=link.num_prefix,
                lse_BHN=lse,
            )
        )
        return out


@dataclass
class DistillProjection(Taught):
    """The student's own attention, and the mean squared error of its queries, keys or values to the teacher's."""

    part: Part = "q"
    projector: nn.Module | None = None

    def taught(self, heads: Heads) -> Tensor:
        teacher = getattr(self.link.teacher_heads(self.tape), self.part)
        student = getattr(self.link.matched_student(heads), self.part)
        self.record(squared_error(student, teacher, self.projector))
        return softmax(heads)


@dataclass
class MatchOutput(Taught):
    """The student's own attention, and the mean squared error of its output to the teacher's.

    Output means P V of every head, before the output projection (LoLCATs, arXiv:2410.10254; "Copy the same,
    distil the difference").
    """

    projector: nn.Module | None = None

    def taught(self, heads: Heads) -> Tensor:
        out = softmax(heads)
        self.compare(out)
        return out

    def compare(self, out_BHND: Tensor) -> None:
        """Record the error of the student's output, of whichever operator it is."""
        link = self.link
        teacher = self.tape.outputs[link.pair.teacher]
        teacher = pick_dim(teacher, 1, None if link.heads.is_identity else link.teacher_index)
        student = pick_dim(out_BHND, 1, None if link.all_heads else link.student_index)
        self.record(
            squared_error(
                pick_dim(student, 2, link.tokens.student),
                pick_dim(teacher, 2, link.tokens.teacher),
                self.projector,
            )
        )

    def watch(self, module: nn.Module, inputs: object, out: Tensor) -> None:
        """As a forward hook of a converted layer's operator: the same, while the teacher's side is on the tape."""
        if self.tape.active:
            self.compare(out)


def squared_error(student: Tensor, teacher: Tensor, projector: nn.Module | None) -> Tensor:
    """Mean squared error over all elements, in float32; heads (B, H, N, D) are joined where a projector changes
    the width."""
    if projector is not None:
        student, teacher = projector(student.transpose(1, 2).flatten(2)), teacher.transpose(1, 2).flatten(2)
    precise = torch.promote_types(student.dtype, torch.float32)
    return F.mse_loss(student.to(precise), teacher.to(precise))


def blend(link: Link, copied: Tensor, own: Tensor) -> Tensor:
    """`own` (B, H, N, D) with the heads and tokens that the link covers taken from `copied`."""
    copied = copied.to(own.dtype)
    if link.tokens.student_only:
        copied = _scatter(
            copied, pick_dim(own, 1, None if link.all_heads else link.student_index), 2, link.tokens.student
        )
    return copied if link.all_heads else _scatter(copied, own, 1, link.student_index)


def _scatter(part: Tensor, whole: Tensor, dim: int, index: list[int] | tuple[int, ...] | None) -> Tensor:
    assert index is not None
    return whole.index_copy(dim, torch.tensor(index, device=whole.device), part)


@dataclass
class Recorder:
    """A teacher operator: keeps the layer's projections, and its output where that is asked for."""

    layer: int
    tape: Tape
    keep_output: bool = False
    needs: Collection[str] = QKV

    def __call__(self, heads: Heads) -> Tensor:
        out = softmax(heads)
        self.keep(heads)
        if self.keep_output:
            self.tape.outputs[self.layer] = out
        return out

    def keep(self, heads: Heads) -> None:
        self.tape.heads[self.layer] = heads
