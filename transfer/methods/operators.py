"""The operators of a hosted student layer that learns from its teacher's; alone, each is plain softmax attention."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.attention.base import Heads
from ...models.attention.fused import attention_with_lse
from ...models.copying.operators import Part, Taught, softmax
from ...models.copying.tokens import pick_dim
from .map_loss import MapLoss


@dataclass
class DistillMap(Taught):
    """The student's own attention, and the cross-entropy of its map to the teacher's."""

    loss: MapLoss = field(default_factory=MapLoss)

    def taught(self, heads: Heads) -> Tensor:
        link, teacher = self.link, self.link.teacher_heads(self.tape)
        lse = None
        if self.loss.needs_own_rows or not link.tokens.student.whole:
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
                link.tokens.student.pick(student, 2),
                link.tokens.teacher.pick(teacher, 2),
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
