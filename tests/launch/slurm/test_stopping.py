"""`graftvit stop` where something is in its way: all others are stopped, and what goes on is said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from graftvit.launch.cli import main
from graftvit.launch.slurm import jobs, lookup, scheduler, stopping
from graftvit.launch.slurm import lookup as processes
from graftvit.launch.slurm.job_folder import JobFolder
from graftvit.launch.slurm.scheduler import JobState, NoSuchJobError
from graftvit.models.errors import CheckpointError, GraftError
from support.runs.patience import until
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_folders import submitted

WAIT = ("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 100")


def controller_of(folder: Path) -> subprocess.Popen[str]:
    """A process that looks like submitit's for a run in `folder`."""
    words = [sys.executable, "-c", "input()", processes.CONTROLLER, str(folder / "logs")]
    return subprocess.Popen(words, stdin=subprocess.PIPE, text=True)


def test_a_damaged_record_is_skipped_and_named(tmp_path: Path) -> None:
    files = submitted(tmp_path, job_id="12")
    for damaged in ('{"job_id": "13"}', "[1]", "[]", "7", "null", "{"):
        record = files.folder / "submissions" / "0002.json"
        record.write_text(damaged)
        assert [one.job_id for one in files.submissions()] == ["12"]
        with pytest.raises(CheckpointError, match=r"0002.json is damaged"):
            files.submission()


@pytest.mark.slurm
def test_a_cell_that_has_just_ended_keeps_no_other_from_being_stopped(
    cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    ids = ["1", *(cluster.run(*WAIT).strip() for _ in range(2))]  # no job has number 1 (any more)
    for place, job in enumerate(ids):
        submitted(tmp_path / "cells" / f"seed={place}", job_id=job)
    asked, real = [], jobs.job_states

    def states(wanted: Iterable[str], tries: int) -> dict[str, JobState]:
        asked.append(list(wanted))
        first = len(asked) == 1
        return dict.fromkeys(asked[0], JobState("RUNNING")) if first else real(asked[-1], tries=tries)

    monkeypatch.setattr(jobs, "job_states", states)
    assert main(["stop", str(tmp_path), "--now"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ids[1:]
    left = ("squeue", "--noheader", f"--jobs={','.join(ids[1:])}")
    until(lambda: not cluster.run(*left).strip(), "the end of the others", every=0.2)


def test_a_job_that_is_ending_already_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(tmp_path, job_id="7")
    monkeypatch.setattr(jobs, "job_states", lambda ids, **_: dict.fromkeys(ids, JobState("COMPLETING")))

    def gone(job_id: str, name: str) -> None:
        raise NoSuchJobError("scancel failed: error: Kill job error on job id 7: Invalid job id specified")

    monkeypatch.setattr(stopping, "signal_job", gone)
    assert main(["stop", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"job 7 of {tmp_path} is ending already\n"
    assert JobFolder(tmp_path).asked_to_stop("7")  # by the next attempt, too, if there is one


def test_a_run_of_another_user_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "cells" / name for name in ("his", "mine")]
    controllers = [controller_of(folder) for folder in folders]
    for folder, process in zip(folders, controllers, strict=True):
        submitted(folder, cluster="local", job_id=str(process.pid))
    touch = Path.touch

    def refuse(path: Path, **kwargs: object) -> None:
        if folders[0] in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        touch(path)

    monkeypatch.setattr(Path, "touch", refuse)
    assert main(["stop", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert f"job {controllers[1].pid} of {folders[1]} saves" in said.out
    his = JobFolder(folders[0]).stop_request(str(controllers[0].pid))
    assert said.err.startswith(
        f"graftvit: error: job {controllers[0].pid} of {folders[0]} continues: {his} cannot be "
    )
    assert "it is the run of" in said.err
    assert said.err.count("\n") == 1
    assert controllers[1].wait(10) != 0

    monkeypatch.undo()
    kill = os.kill

    def forbid(pid: int, number: int) -> None:
        if pid == controllers[0].pid:
            raise PermissionError(1, "Operation not permitted")
        kill(pid, number)

    monkeypatch.setattr(processes.os, "kill", forbid)
    assert main(["stop", str(tmp_path)]) == 1
    assert (
        f"process {controllers[0].pid} cannot be signalled: Operation not permitted"
        in capsys.readouterr().err
    )
    controllers[0].communicate("\n")


def test_several_runs_are_stopped_and_one_that_is_none_keeps_no_other_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tmp_path / name for name in ("a", "b", "c")]
    for number, run in enumerate(runs):
        submitted(run, job_id=str(number))
    states = {"0": JobState("PENDING"), "1": JobState(), "2": JobState("PENDING")}
    monkeypatch.setattr(jobs, "job_states", lambda ids, **_: {job: states[job] for job in ids})
    monkeypatch.setattr(lookup, "queued_jobs", list)
    told: list[str] = []
    monkeypatch.setattr(stopping, "cancel", told.append)
    assert main(["stop", *map(str, runs)]) == 0
    assert f"{runs[1]} has no waiting or running job: it is unknown" in capsys.readouterr().out
    assert told == ["0", "2"]
    told.clear()
    assert main(["stop", str(tmp_path / "nowhere"), *map(str, runs)]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err
    assert told == ["0", "2"]

    def silent(job: str) -> None:
        told.append(job)
        raise GraftError("not yours")

    told.clear()
    monkeypatch.setattr(stopping, "PAUSE", 0.0)
    monkeypatch.setattr(stopping, "cancel", silent)
    assert main(["stop", *map(str, runs)]) == 1
    assert set(told) == {"0", "2"}


@pytest.mark.parametrize("now", [False, True])
def test_cells_that_wait_are_cancelled_in_one_call_before_those_that_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], now: bool
) -> None:
    """Else each node that a running cell leaves is given to another cell, which is killed in its first second."""
    ids = [f"9_{place}" for place in range(6)]
    for job in ids:
        submitted(tmp_path / "cells" / f"cell-{job}", job_id=job)
    states = {job: JobState("RUNNING" if job in ids[:2] else "PENDING") for job in ids}
    orders: list[tuple[str, ...]] = []
    monkeypatch.setattr(jobs, "job_states", lambda wanted, **_: {job: states[job] for job in wanted})
    monkeypatch.setattr(lookup, "queued_jobs", list)
    monkeypatch.setattr(scheduler, "ask", lambda *words, **_: orders.append(words) or "")
    assert main(["stop", str(tmp_path), *(["--now"] if now else [])]) == 0
    signals = [("scancel", "--signal=USR2", job) for job in ids[:2]]
    assert orders == ([("scancel", *ids[2:], *ids[:2])] if now else [("scancel", *ids[2:]), *signals])
    assert capsys.readouterr().out.count("is cancelled") == (6 if now else 4)
    assert all(JobFolder(tmp_path / "cells" / f"cell-{job}").asked_to_stop(job) for job in ids)


def test_a_cell_that_may_not_be_cancelled_is_told_among_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for job in ("9_0", "9_1"):
        submitted(tmp_path / "cells" / f"cell-{job}", job_id=job)
    monkeypatch.setattr(jobs, "job_states", lambda wanted, **_: dict.fromkeys(wanted, JobState("PENDING")))
    monkeypatch.setattr(lookup, "queued_jobs", list)
    monkeypatch.setattr(stopping, "PAUSE", 0.0)

    def refuse(*ids: str) -> None:
        if "9_1" in ids:
            raise GraftError("Access/permission denied")

    monkeypatch.setattr(stopping, "cancel", refuse)
    assert main(["stop", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert (said.out.count("is cancelled"), said.err.count("continues")) == (1, 1)
    assert "job 9_1" in said.err


def test_stop_without_a_run_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop"]) == 2
    assert "RUN" in capsys.readouterr().err


@pytest.mark.slurm
def test_a_suspended_job_is_shown_so_and_cancelled(
    cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    job = cluster.run(*WAIT).strip()
    files = submitted(tmp_path, job_id=job)
    until(lambda: jobs.job_states([job])[job].state == "RUNNING", "the job", every=0.2)
    cluster.run("scontrol", "suspend", job)
    assert (jobs.describe_run(tmp_path).state, jobs.describe_run(tmp_path).why) == ("running", "suspended")
    files.begin(job_id=job, restart=0, nodes=["n1"], world_size=1)
    assert jobs.describe_run(tmp_path).why == "suspended"
    assert main(["stop", str(tmp_path)]) == 0
    assert f"job {job} of {tmp_path} was suspended and is cancelled" in capsys.readouterr().out
    until(lambda: jobs.describe_run(tmp_path).state == "cancelled", "its end", every=0.2)
