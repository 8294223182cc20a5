"""Read weights files without ever running their content; the bytes determine the container, never the name."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..models.errors import CheckpointError, Json, JsonDict
from .files import check_regular, read_regular
from .report import shortened, some
from .safety.archive import tensors_of
from .safety.file_outline import Kind, outline
from .safety.onnx_file import Graph
from .state import check_state, is_state

_NUMBERS = [np.dtype(kind) for kind in "?bBhHiIlLqQefd"]
_SCALAR = np.float64(0).__reduce__()[0]
PLAIN_OBJECTS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    *{type(dtype) for dtype in _NUMBERS},
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""What training files hold beside tensors, as settings; torch makes these only if it is told to."""


@dataclass(frozen=True)
class Content:
    """The content of a file, as it is: a tree of dicts from a .pth, flat tensors from others."""

    path: Path
    tree: JsonDict
    metadata: Mapping[str, str]
    """Of a .safetensors or ONNX file."""
    graph: Graph | None = None
    """Of an ONNX file: which node reads which tensor."""


def read_file(path: Path, inside: Path | None = None) -> Content:
    """Read a .safetensors, torch, .npz or ONNX file.

    What it describes is read and checked first (`safety/file_outline.py`). Torch files are pickles: only tensors, plain
    containers and settings (`PLAIN_OBJECTS`) are rebuilt, always by torch's weights-only loading.

    Args:
        inside: the folder that the file must lie in, where its name comes from another file.

    Raises CheckpointError naming the file: as `check_regular` and `outline`.
    """
    if inside is not None:
        check_regular(path, inside)
    described = outline(path)
    if is_state(described.metadata):
        check_state(path)
    tree = described.tree if described.kind in ("npz", "onnx") else _read(path, described.kind)
    odd = next((name for name, _ in tensors_of(tree) if not name.isprintable()), None)
    if odd is not None:
        raise CheckpointError(f"{path} is refused: the name {odd[:80]!r} of a tensor in it is no plain text")
    return Content(path, tree, described.metadata, described.graph)


def _read(path: Path, kind: Kind) -> JsonDict:
    """Read a file; of an archive only those numbers that are used: an optimizer's stay on the disk."""
    try:
        if kind == "safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with torch.serialization.safe_globals(PLAIN_OBJECTS):
            tree: JsonDict = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch")
            return tree
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path} cannot be read: {reason}") from error


# Weights spread over several files with an index, as Hugging Face libraries write them.

INDEX_SUFFIX = ".index.json"


def read_shards(index: Path, find: Callable[[str], Path | None]) -> Content:
    """Return the tensors that an index lists, each from its file; `find` gives the path of a file by its name.

    Raises CheckpointError: the index is damaged or names files elsewhere, or a file or a tensor is missing.
    """
    names = weight_map(index)
    tree: JsonDict = {}
    for file in dict.fromkeys(names.values()):
        path = find(file)
        if path is None:
            raise CheckpointError(f"{index} lists {file}, which is not there: the weights are not whole")
        held = read_file(path, inside=index.parent).tree
        tree |= {name: tensor for name, tensor in held.items() if names.get(name) == file}
    absent = [name for name in names if name not in tree]
    if absent:
        raise CheckpointError(f"{index} lists {some(absent)}, which its files do not hold")
    return Content(index, {name: tree[name] for name in names}, {})


def weight_map(index: Path) -> dict[str, str]:
    """Tensor names to file names, each a plain name in the index's own folder."""
    text = read_regular(index)
    try:
        names = json.loads(text, object_pairs_hook=_unique)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged: it has no weight_map") from error
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(f"{index} is damaged: its weight_map does not name a file for each tensor")
    elsewhere = [file for file in names.values() if not _is_plain(file)]
    if elsewhere:
        raise CheckpointError(f"{index} is refused: it names {elsewhere[0][:80]!r}, outside of its folder")
    return names


def _is_plain(name: str) -> bool:
    return 0 < len(name) < 256 and name not in (".", "..") and not set(name) & set("/\\:\0")


def _unique(pairs: list[tuple[str, Any]]) -> JsonDict:
    """Return a table of JSON. Raises ValueError: a name is there twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name is there twice")
    return fields


# Hold weights with everything that their source records: every reader returns it, every loader takes it.


@dataclass(frozen=True)
class Weights:
    """Tensors under timm's names, and what is known of the model that they belong to."""

    tensors: dict[str, Tensor]
    origin: str
    """The file, folder or repository, as errors name it."""
    format: str
    """In words, for the report."""
    architecture: str | None = None
    """timm name; None where the source does not say."""
    model_args: Json = field(default_factory=dict)
    """Keyword arguments of timm's constructor."""
    pretrained_cfg: Json = field(default_factory=dict)
    """timm's description: mean, std, license, classifier, input size."""
    norm_eps: float | None = None
    """The norms' epsilon where the source says one; timm has no argument for it that JSON could hold."""
    revision: str | None = None
    notes: tuple[str, ...] = ()
    """Sentences for the report."""
    provenance: Json = field(default_factory=dict)
    """The provenance of a student of this package: teacher, recipe, results (`provenance.py`)."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Keys of the source that its format has no use for, and why."""

    @property
    def img_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the weights were trained on, where the source says it."""
        size = self.model_args.get("img_size")
        if size is None and "input_size" in self.pretrained_cfg:
            size = tuple(self.pretrained_cfg["input_size"])[1:]
        return None if size is None else as_pair(size)


def as_pair(size: Any) -> tuple[int, int]:
    """(height, width) from one whole number or two. Raises CheckpointError: it is neither."""
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(side) is int for side in pair):
        raise CheckpointError(
            f"img_size={shortened(size)} is no size in pixels: write one whole number, or height and width"
        )
    return pair[0], pair[1]
