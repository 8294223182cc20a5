"""Match the output of the heads, P V, with the teacher's (LoLCATs, arXiv:2410.10254)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...models.attention.base import Heads
from ...models.copying.grids import pick_dim
from ...models.copying.tape import Link
from .method import AttentionMethod, Pairing, joined_projector, squared_error
from .taught_layer import Observer


class AttentionOutput(AttentionMethod):
    """The mean squared error of the attention's output; the only one of its kind that converted layers can have."""

    name = "attention_output"
    words = "mean squared error between the outputs of the heads, before the output projection"
    equal_grids = True
    keeps_output = True

    def operator(self, pairing: Pairing, link: Link, projectors: nn.ModuleDict) -> Observer:
        learned = joined_projector(pairing, link, projectors)
        return MatchOutput(link, pairing.tape, pairing.loss_name(link), projector=learned)


@dataclass
class MatchOutput(Observer):
    """The mean squared error of the student's attention output to the teacher's.

    Output means P V of every head, before the output projection (LoLCATs, arXiv:2410.10254; "Copy the same,
    distil the difference").
    """

    reads_projections: ClassVar[bool] = False
    projector: nn.Module | None = None

    def look(self, heads: Heads | None, out_BHND: Tensor, lse_BHN: Tensor | None) -> None:
        link = self.link
        teacher = self.tape.outputs[link.pair.teacher]
        teacher = pick_dim(teacher, 1, None if link.heads.is_identity else link.teacher_index)
        out_BHND = out_BHND if heads is None else heads.joined(out_BHND)
        student = pick_dim(out_BHND, 1, None if link.all_heads else link.student_index)
        self.record(
            squared_error(
                link.tokens.student.pick(student, 2),
                link.tokens.teacher.pick(teacher, 2),
                self.projector,
                self.tape.inside(link),
            )
        )


METHODS = (AttentionOutput(),)
