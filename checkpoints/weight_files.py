"""Read weights files without ever running their content; the bytes determine the container, never the name."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ..models.errors import CheckpointError, JsonDict
from .regular_files import check_regular
from .safety.file_outline import Kind, outline
from .safety.onnx_file import Graph
from .safety.tree import tensors_of
from .state_file import check_state, is_state

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
