"""Two attempts on one run folder: the newer one writes, the older one stops before it spoils anything."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints import state as state_file
from graftvit.checkpoints.files import read_records
from graftvit.checkpoints.state import StateFolder, TrainingState
from graftvit.models.errors import CheckpointError, ConfigError, RunFailedError
from graftvit.transfer.engine import fence as fence_module
from graftvit.transfer.engine.fence import Fence, FencedError
from graftvit.transfer.engine.runlog import RunLog


def state(step: int) -> TrainingState:
    return TrainingState({"student.w": torch.full((3,), float(step))}, {"step": step})


def step_in(folder: Path) -> int:
    found = StateFolder(folder).load()
    assert found is not None
    return int(found.meta["step"])


def taken(folder: Path) -> Fence:
    fence = Fence(folder)
    fence.take()
    return fence


def test_the_newer_attempt_writes_and_the_older_one_does_not(tmp_path: Path) -> None:
    old = taken(tmp_path)
    old.check()
    new = taken(tmp_path)
    new.check()
    message = rf"process {os.getpid()} on .* has taken over the run in {tmp_path}"
    with pytest.raises(FencedError, match=message) as caught:
        old.check()
    assert caught.value.exit_code == 1
    with old.held():
        pass
    new.check()  # giving back leaves the right of the successor


def test_an_attempt_whose_successor_is_through_stays_out(tmp_path: Path) -> None:
    old = taken(tmp_path)
    (tmp_path / "config.yaml").touch()
    with taken(tmp_path).held():
        pass
    assert not (tmp_path / "fence.json").exists()
    with pytest.raises(FencedError, match="another attempt has taken over"):
        old.check()


def test_a_run_whose_files_were_removed_blames_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fence = taken(folder)
    fence.path.unlink()  # `rm -rf` beside a run that writes leaves some of its files
    (folder / "checkpoints").mkdir()
    with pytest.raises(FencedError, match=r"files of the run in .* were removed"):
        fence.check()
    folder.rename(tmp_path / "moved")
    with pytest.raises(FencedError, match=f"^{folder} is not there any more: it was moved or removed;"):
        fence.check()


SLEEPER = "import sys; from graftvit.transfer.engine.fence import Fence; from pathlib import Path\n"
SLEEPER += "Fence(Path(sys.argv[1])).take(); print('taken', flush=True); sys.stdin.read()"


@contextmanager
def holding(folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Let another process take the fence of a folder and live meanwhile."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        yield process
    finally:
        process.communicate()


def test_a_second_command_on_a_machine_is_refused_while_the_first_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holding(tmp_path) as first:
        message = rf"process {first.pid} is writing the run in {tmp_path}: stop it first"
        with pytest.raises(ConfigError, match=message):
            Fence(tmp_path).take()
        monkeypatch.setattr(fence_module, "_boot", lambda: "another machine")
        taken(tmp_path).check()
    monkeypatch.undo()
    fence = taken(tmp_path)
    fence.check()
    holder = json.loads(fence.path.read_text())  # a pid that was given to another process does not refuse
    fence.path.write_text(json.dumps({**holder, "pid": 1, "began": "something else"}))
    taken(tmp_path).check()


def test_a_requeued_job_takes_over_from_its_own_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holding(tmp_path, SLURM_JOB_ID="77"):
        monkeypatch.setenv("SLURM_JOB_ID", "78")
        with pytest.raises(ConfigError, match="is writing the run"):
            Fence(tmp_path).take()
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        taken(tmp_path).check()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token"'])
def test_a_torn_fence_is_taken_and_fences_off_the_old(tmp_path: Path, text: str) -> None:
    old = taken(tmp_path)
    old.path.write_text(text)
    with pytest.raises(FencedError):
        old.check()
    taken(tmp_path).check()


def test_a_save_that_was_under_way_when_another_took_over_changes_nothing(tmp_path: Path) -> None:
    old, folder = taken(tmp_path), tmp_path / "checkpoints"

    @contextmanager
    def replaced_after_the_check() -> Iterator[None]:
        with old.guard():
            if list(folder.glob("incoming*")):  # the file is there, the renames are to come
                new = taken(tmp_path)
                StateFolder(folder, new.token, new.guard).take_over()
            yield

    StateFolder(folder, old.token, old.guard).save(state(1))
    with pytest.raises(FencedError):
        StateFolder(folder, old.token, replaced_after_the_check).save(state(2))
    assert step_in(folder) == 1


@pytest.mark.parametrize("save", [StateFolder.save, StateFolder.save_best])
def test_a_save_whose_files_the_successor_removes_says_who_took_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[[StateFolder, TrainingState], None]
) -> None:
    old, folder = taken(tmp_path), tmp_path / "checkpoints"
    before = StateFolder(folder, old.token, old.guard)
    before.save(state(1))
    real = state_file.save_file

    def replaced_while_writing(*args: Any, **keywords: Any) -> None:
        new = taken(tmp_path)
        StateFolder(folder, new.token, new.guard).take_over()
        real(*args, **keywords)

    monkeypatch.setattr(state_file, "save_file", replaced_while_writing)
    with pytest.raises(FencedError, match="has taken over the run"):
        save(before, state(2))
    assert [path.name for path in folder.iterdir()] == ["last.safetensors"]


def failing(number: int, first: Callable[[], object] = lambda: None) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        first()
        raise OSError(number, os.strerror(number))

    return fail


def test_a_late_rename_of_the_old_attempt_loses_no_state(tmp_path: Path) -> None:
    fence, folder = taken(tmp_path), tmp_path / "checkpoints"
    states = StateFolder(folder, fence.token, fence.guard)
    states.save(state(1))
    states.save(state(2))
    states.last.replace(states.previous)  # as the old attempt's first rename, that the network held back
    assert step_in(folder) == 2
    states.save(state(3))
    assert step_in(folder) == 3


def test_taking_over_names_a_whole_state_that_was_left_between_the_renames(tmp_path: Path) -> None:
    states = StateFolder(tmp_path, "old")
    states.save(state(1))
    states.save(state(2))
    states.last.replace(tmp_path / "incoming.old.safetensors")
    (tmp_path / ".last.safetensors.abc.tmp").mkdir()
    StateFolder(tmp_path, "new").take_over()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.safetensors", "previous.safetensors"]
    assert step_in(tmp_path) == 2


@pytest.mark.parametrize("torn", [True, False])
def test_taking_over_drops_a_torn_state_and_passes_by_one_that_its_writer_renames_meanwhile(
    tmp_path: Path, torn: bool
) -> None:
    StateFolder(tmp_path, "old").save(state(1))
    incoming = tmp_path / "incoming.old.safetensors"
    incoming.write_bytes(b"torn") if torn else incoming.symlink_to(
        "gone"
    )  # found by name, and not there any more
    StateFolder(tmp_path, "new").take_over()
    assert step_in(tmp_path) == 1
    assert not incoming.exists()


def test_a_record_of_the_old_attempt_never_reaches_the_log_of_the_new(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    old = RunLog(path)  # whose check comes too late
    old.keep(0)
    old.append({"step": 1})
    new = RunLog(path)
    new.keep(1)
    old.append({"step": 2})
    new.append({"step": 3})
    assert [record["step"] for record in read_records(path)] == [1, 3]


@pytest.mark.parametrize("step", ["append", "sync"])
def test_a_log_that_is_gone_with_the_right_to_write_says_who_took_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    old = taken(tmp_path)
    log = RunLog(tmp_path / "log.jsonl", old.guard)
    log.append({"step": 1})

    def replaced() -> None:
        monkeypatch.undo()
        taken(tmp_path)

    stale = failing(errno.ESTALE, replaced)  # what NFS says once another machine has replaced an open file
    monkeypatch.setattr(*((os, "fsync") if step == "sync" else (log._file, "write")), stale)
    with pytest.raises(FencedError, match="has taken over the run"):
        log.sync() if step == "sync" else log.append({"step": 2})


def test_a_save_and_a_log_that_fail_for_another_reason_say_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only, log = taken(tmp_path), RunLog(tmp_path / "log.jsonl")
    log.append({"step": 1})
    monkeypatch.setattr(state_file, "save_file", failing(errno.EIO))
    with pytest.raises(CheckpointError, match="cannot be written: Input/output error"):
        StateFolder(tmp_path / "checkpoints", only.token, only.guard).save(state(1))
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(RunFailedError, match=r"log\.jsonl cannot be written: Input/output error"):
        log.sync()


def test_the_log_asks_before_it_writes(tmp_path: Path) -> None:
    old = taken(tmp_path)
    log = RunLog(tmp_path / "log.jsonl", old.guard)
    log.append({"step": 1})
    taken(tmp_path)
    with pytest.raises(FencedError):
        log.append({"step": 2})
    with pytest.raises(FencedError):
        log.keep(0)
    assert [record["step"] for record in read_records(log.path)] == [1]
