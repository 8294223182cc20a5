"""Training states, in one file and in one of each process: good ones, and their damage."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from graftvit.checkpoints.state import TrainingState, read_state, write_state
from graftvit.checkpoints.weight_files import SHARD_NAME
from support.files.hostile import ARCHITECTURE, ARGUMENTS, weights

from .mutations import damage_bytes, damage_json


def make_state(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {f"student.{name}": tensor for name, tensor in weights().items()}
    entry = {"architecture": ARCHITECTURE, "model_args": ARGUMENTS}
    write_state(
        folder / "last.safetensors", TrainingState(tensors, {"student": entry, "position": {"step": 3}})
    )


def damage_state(rng: Random, folder: Path) -> str:
    return _damage_meta(rng, folder / "last.safetensors")


def _damage_meta(rng: Random, path: Path) -> str:
    """Flip bytes of a state's file, or rewrite its JSON header with a valid digest."""
    if rng.random() < 0.6:
        return damage_bytes(rng, path)
    state = read_state(path)
    scratch = path.with_name("meta.json")
    scratch.write_text(json.dumps(state.meta))
    how = damage_json(rng, scratch)
    try:
        meta = json.loads(scratch.read_text())
    except (ValueError, RecursionError, MemoryError):
        meta = {"student": "torn"}
    scratch.unlink()
    write_state(path, TrainingState(state.tensors, meta))
    return f"meta {how}"


def make_parts(folder: Path) -> None:
    """Write the state of a sharded run: the first half of each tensor's rows, and the others."""
    for rank in range(2):
        tensors, pieces = {}, {}
        for name, tensor in weights().items():
            first = rank * (len(tensor) // 2)
            tensors[f"student.{name}"] = tensor[first : None if rank else len(tensor) // 2]
            pieces[f"student.{name}"] = [[first] + [0] * (tensor.ndim - 1), list(tensor.shape)]
        entry = {"architecture": ARCHITECTURE, "model_args": ARGUMENTS}
        meta = {"pieces": pieces, "whole": {"student": entry, "position": {"step": 3}}}
        (folder / "last").mkdir(parents=True, exist_ok=True)
        write_state(folder / "last" / SHARD_NAME.format(rank, 2), TrainingState(tensors, meta))


def damage_parts(rng: Random, folder: Path) -> str:
    path = folder / "last" / SHARD_NAME.format(rng.randint(0, 1), 2)
    if rng.random() < 0.1:
        path.unlink()
        return "part removed"
    return _damage_meta(rng, path)
