"""Write a converted model as a student folder, with a record of its source."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from torch import nn

from ..models.conversion import plan_of, with_plan
from ..models.errors import ConfigError, JsonDict
from ..models.families import is_pyramid
from .pretrained import Pretrained
from .provenance import carried_license, of_weights
from .student import write_student


def write_converted(
    student: nn.Module, folder: Path, teacher: Pretrained, *, weights: str, calibration: str | None = None
) -> None:
    """Write `student`, a conversion of `teacher`'s model, to `folder`.

    Args:
        weights: which of the teacher's weights it has (`models/initialize.py`).
        calibration: the images that its operators were calibrated on, in words.

    Raises:
        ConfigError: no layer of it is converted.
        CheckpointError as `write_student`.
    """
    plan = plan_of(student)
    if plan is None:
        raise ConfigError(f"the plan keeps every layer as it is: {other_operator(student)}")
    architecture, arguments = with_plan(teacher.architecture, teacher.model_args, plan)
    made: JsonDict = {
        "version": version("graftvit"),
        "conversion": {
            "source": teacher.source,
            "plan": plan,
            "weights": weights,
            "calibration": calibration,
        },
    }
    if weights != "none":
        made["init"] = of_weights(teacher.source, teacher.report) | {
            "architecture": teacher.architecture,
            "licence": teacher.license,
            "revision": teacher.revision,
        }
    write_student(
        student,
        folder,
        architecture=architecture,
        model_args=arguments,
        preprocessing=teacher.preprocessing,
        license=carried_license(made),
        provenance=made,
        label_names=teacher.label_names if student.num_classes == teacher.model.num_classes else None,
    )


def other_operator(model: nn.Module) -> str:
    """Return what to name in a plan that changes nothing."""
    return (
        "name an operator or merge: deformable"
        if is_pyramid(model)
        else "name an operator other than softmax"
    )
