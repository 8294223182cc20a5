"""A teacher in words."""

from __future__ import annotations

from ..models.errors import UnsupportedModelError
from ..models.families import attention_shape, check_supported, token_layout
from .teacher import Teacher


def teacher_facts(teacher: Teacher) -> dict[str, str]:
    """What is known of a teacher, one fact a name, in the order to show them."""
    parameters = sum(parameter.numel() for parameter in teacher.model.parameters())
    facts = {
        "source": teacher.source,
        "architecture": teacher.architecture,
        "parameters": f"{parameters:,} ({parameters / 1e6:.1f} M)",
        **_shape(teacher),
        "classes": str(getattr(teacher.model, "num_classes", 0)) if teacher.has_head else "no head",
        "pooling": str(getattr(teacher.model, "global_pool", "") or "none"),
        "mean": _numbers(teacher.mean),
        "std": _numbers(teacher.std),
        "licence": teacher.licence or "unknown: look where the weights come from",
    }
    if teacher.revision is not None:
        facts["revision"] = teacher.revision
    return facts


def describe_teacher(teacher: Teacher) -> str:
    """The facts and the loading report as text, one line each."""
    facts = teacher_facts(teacher)
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    return "\n".join([*lines, *(f"{'weights':<{width}}  {line}" for line in teacher.report.lines())]) + "\n"


def _shape(teacher: Teacher) -> dict[str, str]:
    try:
        check_supported(teacher.model)
    except UnsupportedModelError as error:
        return {"attention": str(error)}
    shape, layout = attention_shape(teacher.model), token_layout(teacher.model)
    return {
        "depth": f"{shape.depth} blocks",
        "attention": f"{shape.num_heads} heads of width {shape.head_dim}, model width {shape.width}",
        "prefix tokens": ", ".join(layout.prefix) or "none",
        "patch grid": f"{layout.grid[0]} x {layout.grid[1]}",
    }


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
