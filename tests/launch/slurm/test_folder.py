"""The files of jobs and attempts, and what is read where they are not whole or not ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from graftvit.launch.slurm.folder import (
    Failure,
    JobFolder,
    known,
    newest_state,
    registry_file,
    remember,
    write_number,
)
from graftvit.models.errors import CheckpointError
from support.slurm.slurm_folders import submitted


def begin(folder: JobFolder, restart: int = 0, job_id: str = "7") -> str:
    return folder.begin(job_id=job_id, restart=restart, nodes=[], world_size=1)


def test_files_carry_number_job_and_restart_and_causes_come_first(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    first, second = (begin(folder, restart, "70_1") for restart in (0, 1))
    assert (first, second) == ("0001-70_1.0", "0002-70_1.1")
    found = [(one.number, one.name, one.restart) for one in folder.attempts()]
    assert found == [(1, first, 0), (2, second, 1)]
    for rank, kind in ((0, "consequence"), (2, "cause"), (11, "consequence")):
        folder.write_failure(second, Failure(rank, kind, True, "boom"))  # type: ignore[arg-type]
    assert (tmp_path / "jobs" / "errors" / "0002-70_1.1-11.txt").exists()
    assert [failure.rank for failure in folder.failures(second)] == [2, 0, 11]
    assert folder.failures(first) == []


def test_what_is_noted_after_a_cut_line_is_read(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    name = begin(folder)
    with folder.attempt_path(name).open("a") as file:
        file.write('{"signal": "SIGUSR')
    folder.note(name, outcome="finished", ended=9.0, of_a_later_version=1)
    assert folder.finished
    folder.attempt_path(name).write_text("7\n[]\n" + folder.attempt_path(name).read_text())
    assert folder.finished


@pytest.mark.parametrize("place", ["checkpoints", "0-recover/checkpoints", "cells/a/checkpoints"])
def test_the_newest_state_changes_with_each_save_and_not_with_a_rename(tmp_path: Path, place: str) -> None:
    assert newest_state(tmp_path) == ""
    last = tmp_path / place / "last.safetensors"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"1")
    first = newest_state(tmp_path)
    last.replace(last.with_name("previous.safetensors"))
    assert newest_state(tmp_path) == first != ""
    last.write_bytes(b"2")
    assert newest_state(tmp_path) != first


KEPT = ("targets.txt", "fit/layer01.safetensors", "0-recover/fit/layer00.safetensors")
BY_COMMANDS = ("fit/layer01.safetensors", "cells/000-001/cell.json")


@pytest.mark.parametrize(
    "place", [*(f"run/{each}" for each in KEPT), *(f"out/{each}" for each in BY_COMMANDS)]
)
def test_what_is_kept_before_the_first_step_counts_as_saved(tmp_path: Path, place: str) -> None:
    """In the run folder, or where a command writes."""
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    order = {"words": ["convert"], "output": str(tmp_path / "out")}
    (tmp_path / "run" / "jobs" / "command.json").write_text(json.dumps(order))
    assert newest_state(tmp_path / "run") == ""
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).touch()
    assert newest_state(tmp_path / "run") != ""


def test_a_run_folder_that_is_gone_stays_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    files = JobFolder(run)
    name = begin(files)
    shutil.rmtree(run / "jobs")
    files.note(name, outcome="failed")  # this creates `jobs/` again
    shutil.rmtree(run)
    writes: list[Callable[[], object]] = [
        lambda: files.note(name, outcome="failed"),
        lambda: files.write_failure(name, Failure(0, "cause", False, "boom")),
    ]
    for write in writes:
        with pytest.raises(FileNotFoundError):
            write()
    assert not run.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("attempts/0001-1.0.jsonl", b"5"),
        ("attempts/0001-1.0.jsonl", b'{"started": 1, "job_id": "7"}'),
        ("attempts/0001-1.0.jsonl", b"\377\376\n"),
        ("attempts/0001 (copy).jsonl", b"{}"),
        ("submissions/0001 (conflicted copy).json", b"{}"),
        ("submissions/0001.json", b""),
        ("submissions/0001.json", b"\377\376"),
    ],
)
def test_files_that_nobody_of_ours_wrote_are_passed_by(tmp_path: Path, name: str, content: bytes) -> None:
    folder = JobFolder(tmp_path)
    path = tmp_path / "jobs" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert (folder.attempts(), folder.jobs(), folder.finished) == ([], [], False)
    folder.withdraw_job("launch-0")
    attempt = begin(folder)
    assert [one.name for one in folder.attempts()] == [attempt]
    submitted(tmp_path)
    assert [one.job_id for one in folder.jobs()] == ["12"]


@pytest.mark.parametrize("damaged", ['{"job_id": "13"}', "[1]", "[]", "7", "null", "{"])
def test_a_damaged_record_is_skipped_and_named(tmp_path: Path, damaged: str) -> None:
    files = submitted(tmp_path)
    (files.folder / "submissions" / "0002.json").write_text(damaged)
    assert [one.job_id for one in files.jobs()] == ["12"]
    with pytest.raises(CheckpointError, match=r"0002.json is damaged"):
        files.job()


def test_a_record_of_somebody_else_names_no_file_elsewhere(tmp_path: Path) -> None:
    files = submitted(tmp_path / "run", job_id="/../../../victim")
    assert files.jobs() == []
    with pytest.raises(CheckpointError, match=r"'/../../../victim' is no name of a file"):
        files.job()


def test_the_registry_keeps_the_order_and_forgets_what_is_gone(tmp_path: Path) -> None:
    assert known() == []
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        remember(tmp_path / name)
    registry_file().write_text(registry_file().read_text().rstrip())  # its last line was cut
    (tmp_path / "b").rmdir()
    (tmp_path / "c\u2028d").mkdir()
    remember(tmp_path / "c\u2028d")
    assert known() == [tmp_path / "a", tmp_path / "c\u2028d"]
    detour = tmp_path / "a" / ".." / "a"
    remember(detour)  # one run under two names
    assert known() == [tmp_path / "c\u2028d", tmp_path / "a"]
    shutil.rmtree(tmp_path / "state")
    (tmp_path / "state").write_text("a home that cannot be written stops no submission")
    remember(tmp_path / "a")
    assert known() == []


def test_the_number_of_a_cell_is_that_of_its_array_and_no_copy_has_it(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    cell, launch = sweep / "cells" / "a", sweep / "jobs" / "launch-0"
    launch.mkdir(parents=True)
    submitted(cell, job_id="", index=3, launch=str(launch), output_dir=str(cell))
    (tmp_path / "link").symlink_to(sweep)
    assert [one.job_id for one in JobFolder(cell).jobs()] == [""]
    write_number(launch, "7")
    for way in (cell, tmp_path / "link" / "cells" / "a"):
        assert [one.job_id for one in JobFolder(way).jobs()] == ["7_3"]
    shutil.copytree(sweep, tmp_path / "copy")
    sweep.rename(tmp_path / "moved")
    for place in ("copy", "moved"):
        other = JobFolder(tmp_path / place / "cells" / "a")
        assert (other.jobs(), other.job()) == ([], None)
        submitted(other.output_dir)  # again, from its new place
        assert [one.job_id for one in other.jobs()] == ["12"]
    copy = JobFolder(tmp_path / "copy" / "cells" / "a")
    copy.withdraw_job(str(launch))
    assert len(list((copy.folder / "submissions").iterdir())) == 1
