"""The error of two tensors, for methods that compare outputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...models.attention.kernels import precise


def squared_error(student: Tensor, teacher: Tensor, projector: nn.Module | None) -> Tensor:
    """Mean squared error over all elements, in float32; heads (B, H, N, D) are joined where a projector changes
    the width."""
    if projector is not None:
        student, teacher = projector(student.transpose(1, 2).flatten(2)), teacher.transpose(1, 2).flatten(2)
    student = precise(student)
    return F.mse_loss(student, teacher.to(student.dtype))
