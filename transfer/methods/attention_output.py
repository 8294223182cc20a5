"""What the heads put out, P V, pulled to the teacher's (LoLCATs, arXiv:2410.10254)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...models.attention.base import Heads
from ...models.copying.copying_operators import Taught, softmax
from ...models.copying.links import Link
from ...models.copying.tokens import pick_dim
from .method import AttentionMethod, Pairing, Watching, joined_projector
from .outputs import squared_error


class AttentionOutput(AttentionMethod):
    """The mean squared error of the attention's output; the only one of its kind that converted layers can have."""

    name = "attention_output"
    words = "mean squared error between what the heads put out, before the output projection"
    equal_grids = True
    keeps_output = True

    def operator(self, pairing: Pairing, link: Link, projectors: nn.ModuleDict) -> Taught:
        return MatchOutput(link, pairing.tape, projector=joined_projector(pairing, link, projectors))


@dataclass
class MatchOutput(Watching):
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


METHODS = (AttentionOutput(),)
