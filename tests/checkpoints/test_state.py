"""At any moment a run folder holds a whole state."""

from __future__ import annotations

import logging
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from graftvit.checkpoints.state import StateFolder, TrainingState, read_state
from graftvit.models.errors import CheckpointError, GraftError


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def at(step: int, size: int = 50) -> TrainingState:
    return TrainingState({"student.weight": torch.full((size,), float(step))}, {"step": step})


def step_of(state: TrainingState | None) -> int | None:
    if state is None:
        return None
    assert torch.all(state.tensors["student.weight"] == state.meta["step"])
    return int(state.meta["step"])


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def test_last_previous_and_best(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "run" / "checkpoints")
    assert folder.load() is None
    folder.save(at(1))
    assert listed(folder.folder) == ["last.safetensors"]
    folder.save(at(2))
    folder.save_best(at(2))
    folder.save(at(3))
    assert step_of(folder.load()) == 3
    assert step_of(read_state(folder.previous)) == 2
    assert step_of(read_state(folder.best)) == 2
    assert listed(folder.folder) == [
        "best.safetensors",
        "last.safetensors",
        "previous.safetensors",
    ]


@pytest.mark.parametrize("links", [True, False])
def test_the_newest_states_are_kept_under_their_steps(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    folder = StateFolder(tmp_path)
    for step in (5, 10, 15, 20):
        folder.save(at(step), keep=2, step=step)
    folder.save(at(20), keep=2, step=20)  # saved again by an attempt that began at 15
    assert listed(tmp_path) == [
        "last.safetensors", "previous.safetensors", "step-00000015.safetensors", "step-00000020.safetensors",
    ]  # fmt: skip
    assert [step_of(read_state(tmp_path / f"step-000000{step}.safetensors")) for step in (15, 20)] == [15, 20]
    folder.save(at(25))  # without the setting, kept states stay
    assert step_of(read_state(tmp_path / "step-00000020.safetensors")) == 20
    assert step_of(folder.load()) == 25


@pytest.mark.parametrize("how", ["flip", "empty", "truncate", "remove"])
def test_a_damaged_last_is_named_and_the_previous_used(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = StateFolder(tmp_path)
    for step in (1, 2):
        folder.save(at(step))
    content = folder.last.read_bytes()
    if how == "remove":
        folder.last.unlink()
    elif how == "flip":
        damage(folder.last)
    else:
        folder.last.write_bytes(b"" if how == "empty" else content[: len(content) // 2])
    peeked = StateFolder(tmp_path).peek()
    assert peeked is not None
    assert peeked["step"] == (2 if how == "flip" else 1)  # the header alone does not tell of a changed tensor
    with caplog.at_level(logging.WARNING):
        assert step_of(StateFolder(tmp_path).load()) == 1
    assert (str(folder.last) in caplog.text) == (how != "remove")


@pytest.mark.parametrize("loaded", [True, False])
def test_a_damaged_last_never_replaces_a_whole_previous(tmp_path: Path, loaded: bool) -> None:
    folder = StateFolder(tmp_path)
    for step in (1, 2):
        folder.save(at(step))
    damage(folder.last)
    again = StateFolder(tmp_path)
    if loaded:
        again.load()
    again.save(at(3))
    assert step_of(read_state(again.last)) == 3
    assert step_of(read_state(again.previous)) == 1


def test_all_damaged_is_an_error_that_names_them(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    for step in (1, 2):
        folder.save(at(step))
    damage(folder.last)
    damage(folder.previous)
    with pytest.raises(
        CheckpointError, match=r"last\.safetensors is damaged.*previous\.safetensors is damaged"
    ):
        folder.load()


@pytest.mark.parametrize("died_after", ["write", "first rename"])
def test_a_death_between_the_renames_loses_nothing(
    tmp_path: Path, died_after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StateFolder(tmp_path)
    for step in (1, 2):
        folder.save(at(step))
    rename = Path.replace
    # The atomic write renames out of its own folder and goes through.
    stop_at = "last.safetensors" if died_after == "write" else "incoming.safetensors"

    def dying(self: Path, target: Path) -> Path:
        if self == tmp_path / stop_at:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        folder.save(at(3))
    monkeypatch.undo()
    again = StateFolder(tmp_path)
    assert step_of(again.load()) == (2 if died_after == "write" else 3)
    again.save(at(4))
    assert step_of(again.load()) == 4
    assert step_of(read_state(again.previous)) == 2
    assert listed(tmp_path) == ["last.safetensors", "previous.safetensors"]


SAVER = """
import sys, pathlib, torch
from graftvit.checkpoints.state import StateFolder, TrainingState
folder = StateFolder(pathlib.Path(sys.argv[1]))
state = folder.load()
step = 0 if state is None else state.meta["step"]
print("ready", flush=True)
while True:
    step += 1
    folder.save(TrainingState({"student.weight": torch.full((300_000,), float(step))}, {"step": step}))
    print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_the_last_reported_state_or_a_newer_one(tmp_path: Path) -> None:
    chance = random.Random(5)
    reached = 0
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        begin = time.perf_counter()
        first = process.stdout.readline()
        time.sleep(chance.uniform(0, 3) * (time.perf_counter() - begin))  # in units of one save
        process.send_signal(signal.SIGKILL)
        reported = [int(line) for line in (first + process.communicate()[0]).split("\n")[:-1]]
        reached = max([reached, *reported])
        state = StateFolder(tmp_path).load()
        assert (step_of(state) or 0) >= reached
    assert reached > 10
    assert len(listed(tmp_path)) <= 4  # at most one leftover of the last death


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root; the limit on file sizes in test_state_file covers it")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_in_one_sentence_and_loses_nothing(small_disk: Path) -> None:
    folder = StateFolder(small_disk / "checkpoints")
    for step in (1, 2):
        folder.save(at(step, 20_000))
    for save in (folder.save, folder.save_best):
        with pytest.raises(
            CheckpointError, match=r"it needs 400,0\d\d bytes and the disk has [\d,]+ free"
        ) as caught:
            save(at(3, 100_000))
        assert isinstance(caught.value, GraftError)
        assert caught.value.exit_code == 1
        assert "\n" not in str(caught.value)
    assert step_of(folder.load()) == 2
    assert step_of(read_state(folder.previous)) == 1
    assert listed(folder.folder) == ["last.safetensors", "previous.safetensors"]
    folder.save(at(4, 20_000))  # what fits goes on
    assert step_of(StateFolder(folder.folder).load()) == 4
