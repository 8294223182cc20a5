"""The JSON of a training state is read by kind: what is no table or no text where one belongs is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graftvit.checkpoints.formats.containers import NAMES, TABLES
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.state import TrainingState, write_state
from graftvit.models.errors import CheckpointError
from support.files.hostile import ARCHITECTURE, ARGUMENTS, weights
from support.files.hostile_configs import changed

META: dict[str, Any] = {
    "student": {"architecture": ARCHITECTURE, "model_args": ARGUMENTS},
    "position": {"step": 3},
}


def state(path: Path, meta: Any) -> str:
    write_state(path, TrainingState({f"student.{key}": tensor for key, tensor in weights().items()}, meta))
    return str(path)


@pytest.mark.parametrize("value", [5, "abc", [1], True, 2e9])
@pytest.mark.parametrize("place", TABLES)
def test_what_is_no_table_is_refused(place: str, value: Any, tmp_path: Path) -> None:
    meta = changed(META, tuple(filter(None, place.split("."))), value)
    with pytest.raises(CheckpointError, match=r"last\.safetensors is damaged: .* is no table"):
        load_pretrained(state(tmp_path / "last.safetensors", meta))


@pytest.mark.parametrize("value", [5, [1], {"a": 1}])
@pytest.mark.parametrize("place", NAMES)
def test_what_is_no_text_is_refused(place: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"last\.safetensors is damaged: {place}=.* is no text"):
        load_pretrained(state(tmp_path / "last.safetensors", changed(META, tuple(place.split(".")), value)))


def test_adapters_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    tensors = {f"student.{key}": tensor for key, tensor in weights().items()}
    tensors["student.blocks.0.attn.qkv.base_layer.weight"] = tensors.pop("student.blocks.0.attn.qkv.weight")
    write_state(path, TrainingState(tensors, META))
    with pytest.raises(CheckpointError, match=r"last\.safetensors is damaged: KeyError"):
        load_pretrained(str(path))
