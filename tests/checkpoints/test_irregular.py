"""A pipe, device, socket or folder in place of any file that we read is one sentence, and never waited for."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.state import (
    StateFolder,
    TrainingState,
    check_state,
    read_meta,
    read_state,
    write_state,
)
from graftvit.checkpoints.upload import plan_upload
from graftvit.models.errors import GraftError
from support.files.hostile_configs import write_model
from support.files.irregular_files import KINDS, irregular, never_waiting

STATE_READERS: list[Callable[[Path], object]] = [check_state, read_meta, read_state]


@pytest.fixture(autouse=True)
def nobody_waits() -> Iterator[None]:
    with never_waiting():
        yield


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_in_place_of_a_file_of_a_model(name: str, kind: str, tmp_path: Path) -> None:
    folder = write_model("plain", tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    if name != "model.safetensors.index.json":
        shutil.copy(folder / "shard.safetensors", folder / "model.safetensors")
    (folder / name).unlink(missing_ok=True)
    irregular(kind, folder / name)
    with pytest.raises(GraftError):
        load_pretrained(f"local-dir:{folder}")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_in_place_of_a_weights_file(kind: str, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match=f"(is {KINDS[kind]}, not a regular file|is a folder)"):
        load_pretrained(str(irregular(kind, tmp_path / "model.safetensors")))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("name", ["README.md", "preprocessor_config.json"])
def test_what_a_model_can_do_without_is_left_out(name: str, kind: str, tmp_path: Path) -> None:
    folder = write_model("plain", tmp_path / "m")
    irregular(kind, folder / name)
    assert load_pretrained(f"local-dir:{folder}").license is None


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("read", STATE_READERS)
def test_in_place_of_a_training_state(read: Callable[[Path], object], kind: str, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match=f"is {KINDS[kind]}, not a regular file"):
        read(irregular(kind, tmp_path / "last.safetensors"))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_run_goes_on_from_the_state_before_one_that_is_no_file(kind: str, tmp_path: Path) -> None:
    write_state(tmp_path / "previous.safetensors", TrainingState({"a": torch.ones(1)}, {"step": 3}))
    irregular(kind, tmp_path / "last.safetensors")
    states = StateFolder(tmp_path)
    assert states.peek() == {"step": 3}
    state = states.load()
    assert state is not None
    assert state.meta == {"step": 3}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_in_place_of_a_file_that_is_published(name: str, kind: str, tmp_path: Path) -> None:
    folder = write_model("plain", tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    irregular(kind, folder / name)
    with pytest.raises(GraftError):
        plan_upload(folder, "me/it", license="mit", confirm_license=True)
