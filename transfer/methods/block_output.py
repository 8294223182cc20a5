"""Match the outputs of the blocks with the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...models.copying.tape import Link, Tape
from ...models.copying.teacher_view import Wanted
from ...models.families import blocks_of, family_of
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
        installed, blocks = Installed(), blocks_of(pairing.student)
        in_sequence = family_of(pairing.student).sequencer(pairing.student)
        for link in pairing.plan.links:
            learned = projector(installed.projectors, link, link.student.width, link.teacher.width)
            match = _MatchBlock(in_sequence, link, pairing.tape, pairing.loss_name(link), learned)
            pairing.changes.hooks.append(blocks[link.pair.student].register_forward_hook(match))
        return installed


@dataclass(eq=False)
class _MatchBlock:
    """A forward hook of a student's block: the error of its output."""

    in_sequence: Callable[[Any], Tensor]
    link: Link
    tape: Tape
    name: str
    projector: nn.Module | None

    def __call__(self, module: nn.Module, inputs: object, out: Any) -> None:
        if not self.tape.active:
            return
        pair, tokens = self.link.pair, self.link.tokens
        student = tokens.student.pick(self.in_sequence(out), 1)
        teacher = tokens.teacher.pick(self.tape.blocks[pair.teacher], 1)
        if self.projector is not None:
            student = self.projector(student)
        self.tape.record(self.name, squared_error(student, teacher, None))


METHODS = (BlockOutput(),)
