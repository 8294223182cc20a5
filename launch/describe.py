"""A teacher in words."""

from __future__ import annotations

from ..checkpoints.teacher import Teacher
from ..models.families import attention_shape, check_supported, token_layout
from .memory import parameter_count


def describe_teacher(teacher: Teacher) -> str:
    """What a teacher is: a line a fact, then how its weights fitted.

    Raises:
        UnsupportedModelError: if no transfer method can read its attention.
    """
    check_supported(teacher.model)
    shape, layout = attention_shape(teacher.model), token_layout(teacher.model)
    height, width = layout.grid
    rows = [
        ("source", teacher.source),
        ("architecture", teacher.architecture),
        ("revision", teacher.revision or "not known"),
        ("licence", teacher.licence or "not known"),
        ("parameters", f"{parameter_count(teacher.model):,}"),
        (
            "attention",
            f"{shape.depth} layers, {shape.num_heads} heads of {shape.head_dim}, width {shape.width}",
        ),
        ("tokens", f"{height}x{width} patches, prefix: {', '.join(layout.prefix) or 'none'}"),
        ("input", f"mean {_numbers(teacher.mean)}, standard deviation {_numbers(teacher.std)}"),
        ("head", f"{teacher.model.num_classes} classes" if teacher.has_head else "none"),
    ]
    lines = [f"{name:<14}{words}" for name, words in rows]
    weights = teacher.report.lines()
    lines += [f"{'weights':<14}{weights[0]}", *(f"{'':<14}{line}" for line in weights[1:])]
    return "\n".join(lines) + "\n"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
