"""Match the outputs of the blocks with the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...models.copying.tape import Link, Tape
from ...models.copying.teacher_view import Wanted
from ...models.families import family_of
from .method import Installed, Pairing, TransferMethod, TransferPlan, projector, squared_error


class BlockOutput(TransferMethod):
    """The mean squared error of the tokens after a block."""

    name = "block_output"
    words = "mean squared error between the outputs of the blocks"
    equal_grids = True
    nears_features = True

    def wanted(self, plan: TransferPlan) -> Wanted:
        return Wanted(blocks=frozenset(plan.teacher_layers))

    def install(self, pairing: Pairing) -> Installed:
        installed, family = Installed(), family_of(pairing.student)
        for link in pairing.plan.links:
            learned = projector(installed.projectors, link, link.student.width, link.teacher.width)
            match = _MatchBlock(link, pairing.tape, pairing.loss_name(link), learned)
            pairing.changes.hooks.append(family.watch_block(pairing.student, link.pair.student, match))
        return installed


@dataclass(eq=False)
class _MatchBlock:
    """The error of the output of a student's block."""

    link: Link
    tape: Tape
    name: str
    projector: nn.Module | None

    def __call__(self, tokens_BNC: Tensor) -> None:
        if not self.tape.active:
            return
        pair, tokens = self.link.pair, self.link.tokens
        student = tokens.student.pick(tokens_BNC, 1)
        teacher = tokens.teacher.pick(self.tape.blocks[pair.teacher], 1)
        if self.projector is not None:
            student = self.projector(student)
        self.tape.record(self.name, squared_error(student, teacher, None, self.tape.inside(self.link)))


METHODS = (BlockOutput(),)
