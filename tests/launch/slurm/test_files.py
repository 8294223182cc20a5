"""The files of attempts: their names carry whose they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from graftvit.launch.slurm.failures import Failure
from graftvit.launch.slurm.job_folder import JobFolder, newest_state
from graftvit.models.errors import CheckpointError
from support.slurm.slurm_folders import submitted


def test_names_carry_number_job_and_restart(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    first = folder.begin(job_id="70_1", restart=0, nodes=[], world_size=1)
    second = folder.begin(job_id="70_1", restart=1, nodes=[], world_size=1)
    assert (first, second) == ("0001-70_1.0", "0002-70_1.1")
    folder.write_failure(second, Failure(3, "cause", False, "boom"))
    assert (tmp_path / "jobs" / "errors" / "0002-70_1.1-3.txt").exists()
    assert [(one.number, one.name, one.restart) for one in folder.attempts()] == [
        (1, first, 0),
        (2, second, 1),
    ]


def test_failures_are_those_of_one_attempt_and_causes_come_first(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    name = folder.begin(job_id="7", restart=0, nodes=[], world_size=3)
    other = folder.begin(job_id="7", restart=1, nodes=[], world_size=3)
    for rank, kind in ((0, "consequence"), (2, "cause"), (11, "consequence")):
        folder.write_failure(name, Failure(rank, kind, True, "boom"))  # type: ignore[arg-type]
    assert [failure.rank for failure in folder.failures(name)] == [2, 0, 11]
    assert folder.failures(other) == []


def test_records_of_before_are_read(tmp_path: Path) -> None:
    for name in ("attempts", "errors"):
        (tmp_path / "jobs" / name).mkdir(parents=True)
    lines = (
        '{"started": 1.0, "job_id": "7", "restart": 0, "nodes": [], "world_size": 4}\n{"outcome": "failed"}\n'
    )
    (tmp_path / "jobs" / "attempts" / "0001.jsonl").write_text(lines)
    (tmp_path / "jobs" / "errors" / "0001-3.txt").write_text("boom\n")
    folder = JobFolder(tmp_path)
    (old,) = folder.attempts()
    assert (old.number, old.name, old.outcome, old.state) == (1, "0001", "failed", None)
    assert [(failure.rank, failure.text) for failure in folder.failures(old.name)] == [(3, "boom\n")]
    assert folder.begin(job_id="7", restart=1, nodes=[], world_size=4) == "0002-7.1"
    assert [(failure.rank) for failure in folder.failures(old.name)] == [3]


def test_what_is_noted_after_a_cut_line_is_read(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    name = folder.begin(job_id="7", restart=0, nodes=[], world_size=1)
    with folder.attempt_path(name).open("a") as file:
        file.write('{"signal": "SIGUSR')
    folder.note(name, outcome="finished", ended=9.0)
    assert folder.finished
    folder.attempt_path(name).write_text("7\n[]\n" + folder.attempt_path(name).read_text())
    assert folder.finished


def test_a_field_of_a_later_version_is_passed_over(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    folder.begin(job_id="7", restart=0, nodes=[], world_size=1, of_a_later_version=1)
    assert len(folder.attempts()) == 1


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


@pytest.mark.parametrize(
    "place", ["targets.txt", "fit/layer01.safetensors", "0-recover/fit/layer00.safetensors"]
)
def test_what_is_kept_before_the_first_step_counts_as_saved(tmp_path: Path, place: str) -> None:
    kept = tmp_path / place
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.touch()
    assert newest_state(tmp_path) != ""


@pytest.mark.parametrize("place", ["fit/layer01.safetensors", "cells/000-001/cell.json"])
def test_what_a_command_keeps_where_it_writes_counts_as_saved(tmp_path: Path, place: str) -> None:
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    order = {"words": ["convert"], "output": str(tmp_path / "out")}
    (tmp_path / "run" / "jobs" / "command.json").write_text(json.dumps(order))
    assert newest_state(tmp_path / "run") == ""
    kept = tmp_path / "out" / place
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert newest_state(tmp_path / "run") != ""


def test_a_request_to_stop_is_for_one_job_and_one_of_before_for_all(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    folder.folder.mkdir()
    folder.stop_request("7").touch()
    assert (folder.asked_to_stop("7"), folder.asked_to_stop("8")) == (True, False)
    folder.stop_path.touch()
    assert folder.asked_to_stop("8")


def test_a_run_folder_that_is_gone_stays_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    files = JobFolder(run)
    name = files.begin(job_id="12", restart=0, nodes=["n1"], world_size=1)
    shutil.rmtree(run / "jobs")
    files.note(name, outcome="failed")  # `jobs/` is made anew
    shutil.rmtree(run)
    for write in (
        lambda: files.note(name, outcome="failed"),
        lambda: files.write_failure(name, Failure(0, "cause", False, "boom")),
    ):
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
    assert (folder.attempts(), folder.submissions(), folder.finished) == ([], [], False)
    folder.withdraw_submission("launch-0")
    attempt = folder.begin(job_id="7", restart=0, nodes=[], world_size=1)
    assert [one.name for one in folder.attempts()] == [attempt]
    submitted(tmp_path)
    assert [one.job_id for one in folder.submissions()] == ["12"]


def test_a_record_of_somebody_else_names_no_file_elsewhere(tmp_path: Path) -> None:
    files = submitted(tmp_path / "run", job_id="/../../../victim")
    assert files.submissions() == []
    with pytest.raises(
        CheckpointError, match=r"the number of a job: '/../../../victim' is no name of a file"
    ):
        files.submission()
