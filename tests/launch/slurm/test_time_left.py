"""The time left is counted down by a run that trains, and by no other."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from graftvit.launch.slurm import jobs
from graftvit.launch.slurm.job_folder import JobFolder
from graftvit.launch.slurm.jobs import describe_run
from graftvit.launch.slurm.jobs_text import describe
from graftvit.launch.slurm.scheduler import JobState
from support.slurm.slurm_folders import submitted

AGE = 400.0
LEFT = 90 * 10.0
"""Seconds of the 90 steps that are left, at ten seconds a step."""


def run_with_log(folder: Path) -> JobFolder:
    """Ten of a hundred steps done, the last record written `AGE` seconds ago."""
    files = submitted(folder)
    (folder / "config.yaml").write_text("optim:\n  max_steps: 100\n")
    log = folder / "log.jsonl"
    log.write_text(json.dumps({"epoch": 0, "step": 10, "seconds": 100.0, "images_per_second": 3.2}) + "\n")
    os.utime(log, (time.time() - AGE,) * 2)
    return files


def left(monkeypatch: pytest.MonkeyPatch, folder: Path, job: JobState) -> float | None:
    monkeypatch.setattr(jobs, "job_states", lambda ids, **_: dict.fromkeys(ids, job))
    return describe_run(folder).progress.seconds_left


def begin(files: JobFolder, restart: int, age: float) -> None:
    begun = files.begin(job_id="12", restart=restart, nodes=["n1"], world_size=1)
    files.note(begun, started=time.time() - age)


def test_a_run_that_trains_counts_down_from_its_last_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begin(run_with_log(tmp_path), 0, AGE + 100)
    found = left(monkeypatch, tmp_path, JobState("RUNNING"))
    assert found == pytest.approx(LEFT - AGE, abs=60)


@pytest.mark.parametrize("state", ["PENDING", "CONFIGURING", "RUNNING", "CANCELLED"])
def test_a_run_that_waits_or_starts_needs_what_it_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str
) -> None:
    begin(run_with_log(tmp_path), 0, AGE + 100)
    assert (
        left(monkeypatch, tmp_path, JobState(state, restarts=1)) == LEFT
    )  # the restart has written nothing yet


def test_an_attempt_before_its_first_record_needs_what_the_run_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = run_with_log(tmp_path)
    begin(files, 0, AGE + 100)
    begin(files, 1, AGE / 2)
    assert left(monkeypatch, tmp_path, JobState("RUNNING", restarts=1)) == LEFT


def test_it_is_said_of_what_the_time_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begin(run_with_log(tmp_path), 0, AGE + 100)
    left(monkeypatch, tmp_path, JobState("PENDING", restarts=1, reason="Resources", start=1.8e9))
    text = describe(describe_run(tmp_path))
    assert "left      0:15:00 once it runs\n" in text
    assert "starts    expected at " in text
