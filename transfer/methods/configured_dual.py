"""The teacher-student wrapper that the settings of a run describe."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...models.copying.teacher_view import Normalization
from ..config import TransferConfig
from .dual import DualViT
from .loss_terms import OF_RUNS, Teacher


def build_dual(
    config: TransferConfig,
    teachers: Mapping[str, Teacher],
    student: nn.Module,
    student_normalization: Normalization,
    calibration: Tensor | None = None,
) -> DualViT:
    """Return the wrapper of a configuration."""
    return DualViT(
        teachers,
        student,
        student_normalization=student_normalization,
        calibration=calibration,
        **{name: getattr(config, name) for name in type(config).model_fields if name not in OF_RUNS},
    )
