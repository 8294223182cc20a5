"""What methods that compare outputs share: the teacher's output on the tape, and the error of two tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...models.attention.kernels import precise
from ...models.copying.tape import Tape
from ...models.families import vit


class Recorded(nn.Module):
    """A whole teacher whose output goes on the tape."""

    def __init__(self, model: nn.Module, tape: Tape) -> None:
        super().__init__()
        self.model = model
        self.tape = tape

    @property
    def blocks(self) -> nn.Module:
        return vit(self.model).blocks

    def forward(self, images: Tensor) -> None:
        self.tape.outputs[0] = self.model(images)


def squared_error(student: Tensor, teacher: Tensor, projector: nn.Module | None) -> Tensor:
    """Mean squared error over all elements, in float32; heads (B, H, N, D) are joined where a projector changes
    the width."""
    if projector is not None:
        student, teacher = projector(student.transpose(1, 2).flatten(2)), teacher.transpose(1, 2).flatten(2)
    student = precise(student)
    return F.mse_loss(student, teacher.to(student.dtype))
