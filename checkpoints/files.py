"""Weights files, read without ever running what is in them; the suffix tells the container, nothing else."""

from __future__ import annotations

import argparse
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from ..models.errors import CheckpointError
from .sources import SAFE_SUFFIXES
from .state_file import check_state, is_state


@dataclass(frozen=True)
class Content:
    """What a file holds, as it is: a tree of dicts from a .pth, flat tensors from a .safetensors."""

    path: Path
    tree: dict[str, Any]
    metadata: dict[str, str]
    """Of a .safetensors file."""


def read_file(path: Path) -> Content:
    """Reads a .safetensors or a torch file.

    Torch files are pickles; only tensors, plain containers and `argparse.Namespace` (MAE's training
    files hold one) are rebuilt, and torch refuses anything else before it could run.

    Raises CheckpointError naming the file: missing, empty, truncated, damaged, or holding more than data.
    """
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty")
        return _read_safe(path) if path.suffix.lower() in SAFE_SUFFIXES else _read_torch(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_safe(path: Path) -> Content:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if is_state(metadata):
                check_state(path)
            names = file.keys()
            return Content(path, {name: file.get_tensor(name) for name in names}, metadata)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def _read_torch(path: Path) -> Content:
    with path.open("rb") as file:
        tree = _unpickle(path, file)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, not a dictionary of weights")
    return Content(path, tree, {})


def _unpickle(path: Path, file: BinaryIO) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from error
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path} is damaged or no torch file: {reason}") from error


def _refusal(path: Path, message: str) -> str:
    """What torch says of an object that is not on its list, in one sentence."""
    found = re.search(r"(?:GLOBAL|[Gg]lobal|class):? `?([A-Za-z_]\w*(?:\.\w+)+)", message)
    if found is None:
        return f"{path} is damaged or no torch file: its pickle cannot be read"
    return (
        f"{path} is refused: it holds {found[1]}, and rebuilding that could run code; save the weights alone "
        "(a state dict) or as .safetensors"
    )
