"""The differences of teacher and student, with warnings for differences where attention transfer is known to fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ...models.errors import check_types
from ...models.families import (
    NativeParts,
    Site,
    attention_shape,
    check_supported,
    depths,
    family_of,
    image_size,
    sites,
    token_layout,
)
from ...models.given import Model, as_model
from ...models.hosting import map_structure

# A model stage by stage, for the report of how teacher and student differ.


def describe_stages(model: nn.Module) -> dict[str, str]:
    """Return the sizes and the structure of the maps of each stage, in words."""
    found = sites(model)
    return {
        "architecture": type(model).__name__,
        "depth": ", ".join(map(str, depths(model))),
        "width": _by_stage(found, lambda site: str(site.width)),
        "heads": _by_stage(found, lambda site: str(site.num_heads) if site.num_heads else "none"),
        "head width": _by_stage(found, lambda site: str(site.head_dim) if site.num_heads else "none"),
        "grid": _by_stage(found, _grid),
        "attends to": _by_stage(found, lambda site: _maps(model, site)),
    }


def _by_stage(found: list[Site], describe: Callable[[Site], str]) -> str:
    """Join the words for each stage; a stage whose layers differ has several."""
    stages: dict[int, dict[str, None]] = {}
    for site in found:
        stages.setdefault(site.stage, {})[describe(site)] = None
    return ", ".join(" or ".join(words) for words in stages.values())


def _grid(site: Site) -> str:
    return "any" if site.geometry is None else "x".join(map(str, site.geometry.grid))


def _maps(model: nn.Module, site: Site) -> str:
    if not site.num_heads:
        return "none"
    if image_size(model) is None:
        return "unknown"
    return map_structure(model, site).brief


ADVICE = "`student.mirror_teacher: true` builds the student with the teacher's native parts"
SOURCE = "Attention Transfer Is Not Universally Effective for ViTs, arXiv:2605.07191"


@dataclass(frozen=True)
class Mismatch:
    """One property that differs between the models, in words."""

    name: str
    teacher: str
    student: str
    warning: str | None = None


def compare_models(teacher: Model, student: Model) -> tuple[Mismatch, ...]:
    """Return all differences of two supported models: sizes, tokens and native parts.

    There is a warning for a part that the student lacks and that belongs to families whose transfer into a plain
    student failed (arXiv:2605.07191: DINOv2, CLIP, BEiTv2 and one more). In the paper, adding the teacher's native
    components solved this. Which component matters is inferred here from the architectures, not measured.
    Where the layers of one of the models are not all alike, they are compared stage by stage: sizes, and the structure
    of the maps.

    Args:
        teacher: in any form that `graftvit.as_model` takes.
        student: in the same forms.

    Raises:
        UnsupportedModelError: one of them is no model of a supported family.
    """
    teacher, student = as_model(teacher, "teacher"), as_model(student, "student")
    for model in (teacher, student):
        check_supported(model, copied=True, attention=False)
    parts_t, parts_s = (family_of(model).native_parts(model) for model in (teacher, student))
    if parts_t is None or parts_s is None:
        stages = zip(describe_stages(teacher).items(), describe_stages(student).values(), strict=True)
        return tuple(Mismatch(name, theirs, ours) for (name, theirs), ours in stages if theirs != ours)
    words = zip(_describe(teacher, parts_t).items(), _describe(student, parts_s).values(), strict=True)
    return tuple(
        Mismatch(name, of_teacher, of_student, _warning(name, parts_t, parts_s))
        for (name, of_teacher), of_student in words
        if of_teacher != of_student
    )


@check_types()
def report_mismatch(mismatches: Sequence[Mismatch]) -> str:
    """Return a table of the differences, then the warnings.

    Args:
        mismatches: what `compare_models` returns.
    """
    if not mismatches:
        return "teacher and student are built alike"
    rows = [("", "teacher", "student"), *((m.name, m.teacher, m.student) for m in mismatches)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    warnings = [f"warning: {mismatch.warning}" for mismatch in mismatches if mismatch.warning]
    return "\n".join([*lines, *warnings])


def _describe(model: nn.Module, parts: NativeParts) -> dict[str, str]:
    shape, tokens, found = attention_shape(model), token_layout(model), sites(model)
    return {
        "depth": str(shape.depth),
        "width": str(shape.width),
        "heads": _by_stage(found, lambda site: str(site.num_heads)),
        "head width": _by_stage(found, lambda site: str(site.head_dim)),
        "patch grid": f"{tokens.grid[0]}x{tokens.grid[1]}",
        "prefix tokens": ", ".join(tokens.prefix) or "none",
        "LayerScale": "no" if parts.layer_scale is None else f"from {parts.layer_scale:g}",
        "registers": str(parts.registers),
        "pre-norm": _yes(parts.pre_norm),
        "activation": parts.activation,
        "MLP": parts.mlp,
        "position": " + ".join(parts.position) or "none",
        "q, k norm": _yes(parts.qk_norm),
        "attention norm": _yes(parts.attention_norm),
        "gate": _yes(parts.gate),
        "qkv bias": _yes(parts.qkv_bias),
        "pooling": parts.pooling or "none",
    }


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _relative_bias(parts: NativeParts) -> bool:
    return any("relative" in kind for kind in parts.position)


# name -> (which teachers have the part, how the warning calls it, whether a model has it)
_RISKS: dict[str, tuple[str, str, Callable[[NativeParts], bool]]] = {
    "LayerScale": ("DINOv2 and BEiTv2", "LayerScale", lambda parts: parts.layer_scale is not None),
    "registers": ("DINOv2", "register tokens", lambda parts: parts.registers > 0),
    "pre-norm": ("CLIP", "a norm before the first block", lambda parts: parts.pre_norm),
    "activation": ("CLIP", "QuickGELU", lambda parts: parts.activation == "quick_gelu"),
    "position": ("BEiTv2", "relative position bias", _relative_bias),
}


def _warning(name: str, teacher: NativeParts, student: NativeParts) -> str | None:
    if name not in _RISKS:
        return None
    owners, part, has = _RISKS[name]
    if not has(teacher) or has(student):
        return None
    return (
        f"the teacher has {part} and the student has not; transfer from teachers with such parts ({owners}) "
        f"into a plain student was seen to fail ({SOURCE}); {ADVICE}"
    )
