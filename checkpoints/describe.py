"""Describe a teacher, or weights that do not load as one, in words."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..models.converted import is_mark
from ..models.copied import copying_of
from ..models.cost import copied_macs, copied_parameters
from ..models.errors import CheckpointError, Json, UnsupportedModelError, counted
from ..models.families import (
    Site,
    attention_shape,
    check_supported,
    depths,
    is_pyramid,
    pooling_of,
    sites,
    token_layout,
)
from .fit import match
from .pretrained import Pretrained, load_pretrained, plan_model, read_source
from .report import grouped
from .timm_models import build
from .weights import Weights


def teacher_facts(teacher: Pretrained) -> dict[str, str]:
    """Return what is known about a teacher, one fact for each name, in the order to show them."""
    parameters = sum(parameter.numel() for parameter in teacher.model.parameters())
    facts = {
        "source": teacher.source,
        "architecture": teacher.architecture,
        "parameters": f"{parameters:,} ({parameters / 1e6:.1f} M)",
        **_shape(teacher),
        "classes": str(getattr(teacher.model, "num_classes", 0)) if teacher.has_head else "no head",
        "pooling": pooling_of(teacher.model) or "none",
        "images": teacher.preprocessing.describe(),
        **_copied(teacher.model),
        "license": teacher.license or "unknown: look where the weights come from",
    }
    if teacher.revision is not None:
        facts["revision"] = teacher.revision
    return facts


def describe_teacher(teacher: Pretrained) -> str:
    """Return the facts and the loading report as text, one line each."""
    facts = teacher_facts(teacher)
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    return "\n".join([*lines, *(f"{'weights':<{width}}  {line}" for line in teacher.report.lines())]) + "\n"


def describe_source(
    source: str, *, model: str | None = None, model_args: Json | None = None, **how: Any
) -> tuple[str, CheckpointError | None]:
    """Describe a source: what it is, what would load, what would not, and why it does not load.

    The arguments are those of `load_pretrained`.

    Raises CheckpointError: the source cannot be read at all.
    """
    try:
        teacher = load_pretrained(source, model=model, model_args=model_args, **how)
        return describe_teacher(teacher), None
    except CheckpointError as error:
        asked = dict(model_args or {})
        weights = read_source(source, asked, how.get("revision"))
        return _describe_misfit(source, weights, asked, model), error


def _describe_misfit(source: str, weights: Weights, asked: Json, model: str | None) -> str:
    count = sum(tensor.numel() for tensor in weights.tensors.values())
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in weights.tensors.values())
    rows = [
        ("source", source),
        ("weights", weights.format),
        ("tensors", f"{len(weights.tensors)} with {count:,} numbers, {', '.join(kinds)}"),
        ("architecture", weights.architecture or model or "not known"),
        *(("left out", line) for line in grouped(weights.left_out)),
    ]
    with contextlib.suppress(CheckpointError):
        plan = plan_model(weights, asked, model)
        built = build(plan.architecture, plan.arguments, on_meta=True, within=plan.weights.tensors)
        found = match(built, plan.weights, role="teacher", method="timm", classifiers=plan.classifiers)
        total = sum(not is_mark(key) for key in weights.tensors)
        rows.append(("would load", f"{len(found.present) - len(found.wrong)} of {total} tensors"))
        rows += [
            ("would not", f"{kind}: {line}")
            for kind, keys in found.problems.items()
            for line in by_block(keys)
        ]
    return "".join(f"{name:<14}{words}\n" for name, words in rows)


def by_block(keys: Iterable[str]) -> list[str]:
    """Return keys with the number of the block as a star, and how often each is there."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", key) for key in keys)
    return [key if count == 1 else f"{key} ({count} times)" for key, count in counts.items()]


def _copied(model: nn.Module) -> dict[str, str]:
    """Return what a model copies from its teacher, and what both parts cost."""
    copying = copying_of(model)
    if copying is None:
        return {}
    pairs = ", ".join(f"{pair.teacher}>{pair.student}" for pair in copying.layers)
    costs = zip(
        ("the student", "its teacher's part"), copied_parameters(model), copied_macs(model), strict=True
    )
    return {
        "copies": f"{copying.method} of {copying.teacher.architecture}, layers (teacher>student) {pairs}",
        "cost": "; ".join(
            f"{name}: {count:,} parameters, {macs / 1e6:,.1f} M multiply-adds an image"
            for name, count, macs in costs
        ),
    }


def _shape(teacher: Pretrained) -> dict[str, str]:
    try:
        check_supported(teacher.model, copied=True, pyramids=True)
    except UnsupportedModelError as error:
        return {"attention": str(error)}
    if is_pyramid(teacher.model):
        return _stages(teacher)
    shape, layout = attention_shape(teacher.model), token_layout(teacher.model)
    return {
        "depth": f"{shape.depth} blocks",
        "attention": f"{shape.num_heads} heads of width {shape.head_dim}, model width {shape.width}",
        "prefix tokens": ", ".join(layout.prefix) or "none",
        "patch grid": f"{layout.grid[0]} x {layout.grid[1]}",
    }


def _stages(teacher: Pretrained) -> dict[str, str]:
    """Return the blocks, heads and grid of each stage of a pyramid."""
    first = [site for site in sites(teacher.model) if site.place == 0]
    counts = depths(teacher.model)
    words = [
        f"{counted(count, 'block')} {_heads(site)}, model width {site.width}, grid "
        + " x ".join(map(str, site.shape.geometry.grid))
        for count, site in zip(counts, first, strict=True)
    ]
    return {"depth": f"{sum(counts)} blocks"} | {f"stage {n}": text for n, text in enumerate(words, 1)}


def _heads(site: Site) -> str:
    return (
        f"with {counted(site.num_heads, 'head')} of width {site.head_dim}"
        if site.num_heads
        else "without attention"
    )
