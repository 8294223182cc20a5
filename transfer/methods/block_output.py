"""What the blocks put out, pulled to the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...models.copying.links import Link
from ...models.copying.tape import Tape
from ...models.copying.teacher_view import view_blocks
from ...models.families import attention_blocks
from .method import Installed, Pairing, TransferMethod, projector
from .outputs import squared_error


class BlockOutput(TransferMethod):
    """The mean squared error of the tokens after a block."""

    name = "block_output"
    words = "mean squared error between what the blocks put out"
    equal_grids = True
    nears_features = True

    def install(self, pairing: Pairing) -> Installed:
        plan, tape = pairing.plan, pairing.tape
        installed = Installed(view_blocks(pairing.teacher, plan.teacher_layers, tape))
        blocks = attention_blocks(pairing.student)
        for link in plan.links:
            learned = projector(installed.projectors, link, plan.student.width, plan.teacher.width)
            match = _MatchBlock(link, tape, learned)
            pairing.changes.hooks.append(blocks[link.pair.student].register_forward_hook(match))
        return installed


@dataclass(eq=False)
class _MatchBlock:
    """A forward hook of a student's block: the error of its output."""

    link: Link
    tape: Tape
    projector: nn.Module | None

    def __call__(self, module: nn.Module, inputs: object, out: Tensor) -> None:
        if not self.tape.active:
            return
        pair, tokens = self.link.pair, self.link.tokens
        student = tokens.student.pick(out, 1)
        teacher = tokens.teacher.pick(self.tape.outputs[pair.teacher], 1)
        if self.projector is not None:
            student = self.projector(student)
        self.tape.record(pair.student, squared_error(student, teacher, None))


METHODS = (BlockOutput(),)
