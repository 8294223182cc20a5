"""Read weights files without ever running their content; the bytes determine the container, never the name."""

from __future__ import annotations

import argparse
import pathlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..models.errors import CheckpointError
from ..models.json_types import JsonDict
from .regular_files import check_regular
from .safety.file_outline import Kind, check_names, outline
from .safety.tree import check_tree, tensors_of
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
    """The content of a file, as it is: a tree of dicts from a .pth, flat tensors from a .safetensors or .npz."""

    path: Path
    tree: JsonDict
    metadata: dict[str, str]
    """Of a .safetensors file."""


def read_file(path: Path, inside: Path | None = None) -> Content:
    """Reads a .safetensors, torch or .npz file.

    What it describes is read and checked first (`safety/file_outline.py`). Torch files are pickles: only tensors, plain
    containers and settings (`PLAIN_OBJECTS`) are rebuilt, always by torch's weights-only loading.

    Args:
        inside: the folder that the file must lie in, where its name comes from another file.

    Raises CheckpointError naming the file: as `check_regular` and `outline`.
    """
    if inside is not None:
        check_regular(path, inside)
    described = outline(path)
    try:
        if described.kind == "safetensors":
            return _read_safe(path, described.metadata)
        if described.kind == "npz":
            return _read_arrays(path)
        return Content(path, read_torch(path, described.kind), {})
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise CheckpointError(
            f"{path} cannot be read: its {described.size:,} bytes need more memory than there is"
        ) from error


def _read_safe(path: Path, metadata: dict[str, str]) -> Content:
    if is_state(metadata):
        check_state(path)
    try:
        with safe_open(path, framework="pt") as file:
            return Content(path, {name: file.get_tensor(name) for name in file.keys()}, metadata)  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def read_torch(path: Path, kind: Kind) -> JsonDict:
    """Return the tree in a torch file that `outline` has checked.

    Of an archive only those numbers are read that are used: an optimizer's stay on the disk.
    """
    try:
        with torch.serialization.safe_globals(PLAIN_OBJECTS):
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch")
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path} is damaged or no torch file: {reason}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, not a dictionary of weights")
    check_tree(path, tree)
    check_names(path, dict(tensors_of(tree)))
    return tree


def _read_arrays(path: Path) -> Content:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return Content(path, {name: torch.from_numpy(archive[name]) for name in archive.files}, {})
    except (ValueError, TypeError, KeyError, EOFError) as error:
        raise CheckpointError(
            f"{path} is damaged or holds numbers that torch has no type for: {error}"
        ) from error
