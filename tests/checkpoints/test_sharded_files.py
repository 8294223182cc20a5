"""A state in a folder with a file of each process: read as one, whole or not at all, beside states of one file."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from graftvit.checkpoints.state import (
    StateFolder,
    TrainingState,
    check_state,
    find_state,
    read_meta,
    write_state,
)
from graftvit.checkpoints.weight_files import SHARD_NAME, is_sharded, read_file
from graftvit.models.errors import CheckpointError

WHOLE = torch.arange(15.0).view(5, 3)


def write_shards(folder: Path, step: int, offsets: tuple[int, int] = (0, 3)) -> None:
    """Write `WHOLE` times `step` in two parts: its rows 0 to 2, and 3 and 4."""
    folder.mkdir(parents=True)
    for rank, (first, rows) in enumerate(zip(offsets, (3, 2), strict=True)):
        tensors = {"student.weight": step * WHOLE[first : first + rows]}
        meta: dict[str, object] = {
            "pieces": {"student.weight": [[first, 0], [5, 3]]},
            "state": f"digest {step}",
        }
        meta |= {} if rank else {"whole": {"step": step}}
        write_state(folder / SHARD_NAME.format(rank, 2), TrainingState(tensors, meta))


def save(folder: Path, step: int, *, best: bool = False, keep: int = 0) -> None:
    states = StateFolder(folder)
    write_shards(states.incoming, step)
    states.commit(last=True, best=best, keep=keep, step=step)


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_parts_are_read_as_one_state(tmp_path: Path) -> None:
    write_shards(tmp_path / "last", 2)
    assert is_sharded(tmp_path / "last")
    assert read_meta(tmp_path / "last") == {"step": 2}
    assert torch.equal(read_file(tmp_path / "last").tree["student.weight"], 2 * WHOLE)


@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "overlap", "exchange"])
def test_a_damaged_part_leaves_the_state_before(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    path = tmp_path / "last" / SHARD_NAME.format(1, 2)
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[-3] ^= 4
    if how == "truncate":
        del content[-10:]
    path.write_bytes(content)
    if how == "remove":
        path.unlink()
    if how == "overlap":
        meta = {"pieces": {"student.weight": [[4, 0], [5, 3]]}, "state": "digest 2"}
        write_state(path, TrainingState({"student.weight": WHOLE[3:]}, meta))
    if how == "exchange":
        shutil.copy(tmp_path / "previous" / path.name, path)
    with pytest.raises(CheckpointError, match=str(tmp_path / "last")):
        check_state(tmp_path / "last")
    with caplog.at_level(logging.WARNING):
        found = StateFolder(tmp_path).load()
    assert found is not None
    assert found.meta == {"step": 1}
    assert found.folder == tmp_path / "previous"
    assert "going on from" in caplog.text


def test_states_of_both_kinds_take_turns(tmp_path: Path) -> None:
    states, one = StateFolder(tmp_path), TrainingState({"student.weight": WHOLE}, {"step": 1})
    states.save(one)
    states.save_best(one)
    save(tmp_path, 2, best=True, keep=1)
    assert listed(tmp_path) == ["best", "last", "previous.safetensors", "step-00000002"]
    save(tmp_path, 3, best=True, keep=1)
    assert listed(tmp_path) == ["best", "last", "previous", "step-00000003"]
    assert [read_meta(find_state(tmp_path, name))["step"] for name in ("best", "last", "previous")] == [
        3,
        3,
        2,
    ]
    states.save(one)
    states.save_best(one)
    assert listed(tmp_path) == ["best.safetensors", "last.safetensors", "previous", "step-00000003"]


def test_what_a_dead_process_set_aside_comes_back(tmp_path: Path) -> None:
    write_shards(tmp_path / "best.old", 1)
    write_shards(tmp_path / "last", 2)
    write_shards(tmp_path / "previous.old", 1)
    write_shards(tmp_path / "previous", 1)
    write_shards(tmp_path / "incoming.dead", 3)
    (tmp_path / "incoming.dead" / SHARD_NAME.format(0, 2)).unlink()
    StateFolder(tmp_path, "new").take_over()
    assert listed(tmp_path) == ["best", "last", "previous"]
