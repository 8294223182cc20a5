"""Show what is in other people's files, and extract their weights."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..models.errors import CheckpointError, Json, JsonDict
from .atomic import write_file
from .formats.containers import unwrap
from .formats.described import as_metadata
from .formats.normalization import IMAGENET
from .formats.read import read_weights
from .report import printable
from .safety.file_outline import outline
from .safety.tree import children, tensors_of
from .sources import PICKLE_SUFFIXES, SAFE_SUFFIXES, FileSource
from .weight_files import read_file
from .weights import Weights

METADATA_WIDTH = 80


@dataclass(frozen=True)
class Extracted:
    """The result of `extract`."""

    path: Path
    tensors: int
    nbytes: int
    left_out: tuple[str, ...]
    """The other entries of the file."""


def describe_file(path: Path) -> list[str]:
    """Container, tensors with dtype, shape and size, totals, and what else is there; one line each.

    No tensor is read, except of an .npz or ONNX file.

    Raises CheckpointError as `outline`.
    """
    found = outline(path)
    rows = [(name, str(t.dtype).removeprefix("torch."), t) for name, t in tensors_of(found.tree)]
    width = max((len(name) for name, *_ in rows), default=0)
    lines = [f"{path}: {found.kind}, {found.size:,} bytes"]
    lines += [
        f"  {name:<{width}}  {dtype:<8}  {_shape(tensor):<20}  {tensor.nbytes:>14,}"
        for name, dtype, tensor in rows
    ]
    total = sum(tensor.nbytes for *_, tensor in rows)
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in Counter(dtype for _, dtype, _ in rows).items())
    lines.append(f"{len(rows)} tensors ({kinds or 'none'}), {total:,} bytes")
    return [printable(line) for line in (*lines, *_entries(found.tree), *_metadata(found.metadata))]


def extract(source: FileSource, out: Path, *, overwrite: bool = False) -> Extracted:
    """Write one part's weights, under the names that the file gives them, to a .safetensors or torch file.

    The names in an ONNX file are no state dict's: its weights get timm's.

    Pretrained, optimizer, averages and settings stay behind. Tensors that share their numbers are written once each.

    Raises CheckpointError: as `read_file` and `unwrap`; `out` exists, its suffix names no container, or its container
    cannot hold the source's description of the model.
    """
    if out.suffix not in (*SAFE_SUFFIXES, *PICKLE_SUFFIXES):
        valid = ", ".join((*SAFE_SUFFIXES, *PICKLE_SUFFIXES))
        raise CheckpointError(f"{out} has the suffix {out.suffix or 'of nothing'!r}; valid: {valid}")
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} is there already: give another name, or --force to replace it")
    content = read_file(source.path)
    is_graph = content.graph is not None
    weights = read_weights(content, source.part) if is_graph else unwrap(content, source.part)
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


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"
