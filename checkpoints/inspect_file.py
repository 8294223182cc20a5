"""Other people's files: what is in them, and their weights alone."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..models.errors import CheckpointError
from .atomic import write_file
from .files import read_file
from .formats.containers import unwrap
from .report import printable
from .safety.outline import Outline, outline, tensors_of
from .safety.pickle_outline import children
from .sources import PICKLE_SUFFIXES, SAFE_SUFFIXES, FileSource

METADATA_WIDTH = 80


@dataclass(frozen=True)
class Extracted:
    """What `extract` wrote."""

    path: Path
    tensors: int
    nbytes: int
    left_out: tuple[str, ...]
    """The other entries of the file."""


def describe_file(path: Path) -> list[str]:
    """Container, tensors with dtype, shape and size, totals, and what else is there; one line each.

    The description of the file is read, and none of its tensors.

    Raises CheckpointError as `outline`.
    """
    found = outline(path)
    rows = [
        (
            name,
            entry.dtype if isinstance(entry.dtype, str) else str(entry.dtype).removeprefix("torch."),
            entry,
        )
        for name, entry in tensors_of(found.tree)
    ]
    width = max((len(name) for name, *_ in rows), default=0)
    lines = [f"{path}: {found.kind}, {found.size:,} bytes"]
    lines += [
        f"  {name:<{width}}  {dtype:<8}  {_shape(entry.shape):<20}  {entry.nbytes:>14,}"
        for name, dtype, entry in rows
    ]
    total = sum(entry.nbytes for *_, entry in rows)
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in Counter(dtype for _, dtype, _ in rows).items())
    lines.append(f"{len(rows)} tensors ({kinds or 'none'}), {total:,} bytes")
    return [printable(line) for line in (*lines, *_entries(found), *_metadata(found.metadata))]


def extract(source: FileSource, out: Path, *, overwrite: bool = False) -> Extracted:
    """Writes one part's weights, under the names that the file gives them, to a .safetensors or torch file.

    Teacher, optimiser, averages and settings stay behind. Tensors that share their numbers are written once each.

    Raises CheckpointError: as `read_file` and `unwrap`; `out` is there, or its suffix is of no container.
    """
    if out.suffix not in (*SAFE_SUFFIXES, *PICKLE_SUFFIXES):
        valid = ", ".join((*SAFE_SUFFIXES, *PICKLE_SUFFIXES))
        raise CheckpointError(f"{out} has the suffix {out.suffix or 'of nothing'!r}; valid: {valid}")
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} is there already: give another name, or --force to replace it")
    content = read_file(source.path)
    weights = unwrap(content, source.part)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in weights.tensors.items()}
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_file(out, lambda temporary: _write(tensors, temporary, source), size=nbytes)
    kept = set(map(id, weights.tensors.values()))
    left = tuple(str(key) for key, value in content.tree.items() if not _holds(value, kept))
    return Extracted(out, len(tensors), nbytes, left)


def _write(tensors: Mapping[str, Tensor], path: Path, source: FileSource) -> None:
    if path.suffix in SAFE_SUFFIXES:
        part = "" if source.part is None else f"#{source.part}"
        save_file(dict(tensors), path, metadata={"format": "pt", "source": f"{source.path.name}{part}"})
    else:
        torch.save(dict(tensors), path)


def _holds(value: Any, kept: set[int]) -> bool:
    return id(value) in kept or any(_holds(child, kept) for child in children(value))


def _entries(found: Outline) -> list[str]:
    """The top of the tree, where it is more than tensors by name."""
    lines = []
    for key, value in found.tree.items():
        inner = sum(1 for _ in tensors_of(value))
        if isinstance(value, (dict, list, tuple)):
            lines.append(f"  {key}: {type(value).__name__} of {len(value)}, {inner} tensors")
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


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
