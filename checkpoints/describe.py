"""Describe a teacher, or weights that do not load as one, in words."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.converted import is_mark
from ..models.copied import copying_of
from ..models.cost import copied_macs, copied_parameters
from ..models.errors import CheckpointError, Json, JsonDict, UnsupportedModelError, check_types, counted
from ..models.families import (
    Site,
    attention_shape,
    check_supported,
    depths,
    family_of,
    pooling_of,
    sites,
    token_layout,
)
from .architecture import build
from .atomic import write_file
from .copying_students import refuse_without_teacher
from .files import at_home
from .fit import match
from .formats import read_weights
from .formats.containers import as_metadata, unwrap
from .formats.keymap import IMAGENET
from .model_folders import open_source
from .pretrained import load_pretrained, plan_model, read_source
from .provenance import Pretrained
from .report import grouped, printable
from .safety import children, tensors_of
from .sources import PICKLE_SUFFIXES, SAFE_SUFFIXES, FileSource
from .weight_files import Weights, outline, read_file


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


@check_types()
def describe_teacher(teacher: Pretrained) -> str:
    """Return the facts and the loading report as text, one line each."""
    facts = teacher_facts(teacher)
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    return "\n".join([*lines, *(f"{'weights':<{width}}  {line}" for line in teacher.report.lines())]) + "\n"


@check_types()
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
        weights = read_source(open_source(source, how.get("revision")), asked)
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
        check_supported(teacher.model, copied=True)
    except UnsupportedModelError as error:
        return {"attention": str(error)}
    if family_of(teacher.model).native_parts(teacher.model) is None:
        return _stages(teacher)
    shape, layout = attention_shape(teacher.model), token_layout(teacher.model)
    heads = dict.fromkeys(f"{site.num_heads} heads of width {site.head_dim}" for site in sites(teacher.model))
    return {
        "depth": f"{shape.depth} blocks",
        "attention": f"{' or '.join(heads)}, model width {shape.width}",
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


# Show what is in other people's files, and extract their weights.

METADATA_WIDTH = 80


@dataclass(frozen=True)
class Extracted:
    """The result of `extract`."""

    path: Path
    tensors: int
    nbytes: int
    left_out: tuple[str, ...]
    """The other entries of the file."""


@check_types()
def describe_file(path: str | PathLike[str]) -> list[str]:
    """Container, tensors with dtype, shape and size, totals, and what else is there; one line each.

    No tensor is read, except of an .npz or ONNX file.

    Raises CheckpointError as `outline`.
    """
    path = at_home(path)
    found = outline(path)
    rows = [(name, str(t.dtype).removeprefix("torch."), t) for name, t in tensors_of(found.tree)]
    width = max((len(name) for name, *_ in rows), default=0)
    lines = [f"{path}: {found.format}, {path.stat().st_size:,} bytes"]
    lines += [
        f"  {name:<{width}}  {dtype:<8}  {_format_shape(tensor):<20}  {tensor.nbytes:>14,}"
        for name, dtype, tensor in rows
    ]
    total = sum(tensor.nbytes for *_, tensor in rows)
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in Counter(dtype for _, dtype, _ in rows).items())
    lines.append(f"{len(rows)} tensors ({kinds or 'none'}), {total:,} bytes")
    return [printable(line) for line in (*lines, *_entries(found.tree), *_metadata(found.metadata))]


@check_types()
def extract(source: FileSource, out: Path, *, overwrite: bool = False) -> Extracted:
    """Write one part's weights, under the names that the file gives them, to a .safetensors or torch file.

    The names in an ONNX file are no state dict's: its weights get timm's.

    Pretrained, optimizer, averages and settings stay behind. Tensors that share their numbers are written once each.

    Raises CheckpointError: as `read_file`, `unwrap` and `refuse_without_teacher`; `out` exists, its suffix names no
    container, or its container cannot hold the source's description of the model.
    """
    if out.suffix not in (*SAFE_SUFFIXES, *PICKLE_SUFFIXES):
        valid = ", ".join((*SAFE_SUFFIXES, *PICKLE_SUFFIXES))
        raise CheckpointError(f"{out} has the suffix {out.suffix or 'of nothing'!r}; valid: {valid}")
    if out.exists() and not overwrite:
        raise CheckpointError(
            f"{out} is there already: give another name, or --force (in Python overwrite=True) to replace it"
        )
    content = read_file(source.path)
    is_graph = content.graph is not None
    weights = read_weights(content, source.part) if is_graph else unwrap(content, source.part)
    refuse_without_teacher(weights)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in weights.tensors.items()}
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    tree, metadata = _contents(out, replace(weights, tensors=tensors), source)
    write_file(out, lambda temporary: _write(tree, metadata, temporary), size=nbytes)
    kept = set(map(id, weights.tensors.values()))
    left = tuple(str(key) for key, value in content.tree.items() if not _holds(value, kept))
    left = tuple(weights.left_out) if is_graph else left
    return Extracted(out, len(tensors), nbytes, left)


def _contents(out: Path, weights: Weights, source: FileSource) -> tuple[JsonDict, dict[str, str]]:
    """Return what is written, with metadata from which the model is built as from the source.

    A torch file has no metadata. As MAE and DeiT write them, a dictionary around the weights stands for ImageNet's
    normalization; others have no such entry.
    """
    if out.suffix in SAFE_SUFFIXES:
        part = "" if source.part is None else f"#{source.part}"
        return weights.tensors, {
            "format": "pt", "source": f"{source.path.name}{part}", **as_metadata(weights)
        }  # fmt: skip
    arch = {} if weights.architecture is None else {"arch": weights.architecture}
    if dict(weights.pretrained_cfg) == dict(IMAGENET) and not weights.model_args:
        return {"model": weights.tensors, **arch}, {}
    if weights.pretrained_cfg or weights.model_args:
        raise CheckpointError(
            f"{out} could not say how {source.path} prepares its images and builds its model: write .safetensors"
        )
    return ({"state_dict": weights.tensors, **arch} if arch else weights.tensors), {}


def _write(tree: JsonDict, metadata: dict[str, str], path: Path) -> None:
    if path.suffix in SAFE_SUFFIXES:
        save_file(tree, path, metadata=metadata)
    else:
        torch.save(tree, path)


def _holds(value: Any, kept: set[int]) -> bool:
    return id(value) in kept or any(_holds(child, kept) for child in children(value).values())


def _entries(tree: Json) -> list[str]:
    """Return the top of the tree, if it is more than tensors by name."""
    lines = []
    for key, value in tree.items():
        kind = "dict" if isinstance(value, dict) else type(value).__name__
        inner = sum(1 for _ in tensors_of(value))
        if isinstance(value, (dict, list, tuple)):
            lines.append(f"  {key}: {kind} of {len(value)}, {inner} tensors")
        elif isinstance(value, argparse.Namespace):
            lines.append(f"  {key}: settings, {', '.join(sorted(vars(value)))[:METADATA_WIDTH]}")
        elif not inner:
            lines.append(f"  {key}: {_short(value)}")
    return ["entries:", *lines] if lines else []


def _metadata(metadata: Mapping[str, str]) -> list[str]:
    return (
        ["metadata:", *(f"  {key}: {_short(value)}" for key, value in metadata.items())] if metadata else []
    )


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= METADATA_WIDTH else f"{text[:METADATA_WIDTH]}…"


def _format_shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"
