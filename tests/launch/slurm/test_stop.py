"""`stop`: whatever is in the way, each job is ended or waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from graftvit.launch.slurm import jobs, lock, scheduler, stop
from graftvit.launch.slurm.folder import JobFolder, write_number
from graftvit.launch.slurm.scheduler import NoSuchJobError
from graftvit.models.errors import GraftError
from support.runs.patience import until
from support.runs.typed import Typed
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_folders import SILENT, FakeSlurm, failing, submitted


def cells(root: Path, *ids: str) -> list[Path]:
    """A cell for each job."""
    return [submitted(root / "cells" / f"cell-{job}", job_id=job).output_dir for job in ids]


def controller_of(folder: Path, program: str = "input()") -> subprocess.Popen[str]:
    """A process that looks like submitit's for a run in `folder`."""
    words = [sys.executable, "-c", program, lock.CONTROLLER, str(folder / "logs")]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    submitted(folder, cluster="local", job_id=str(process.pid))
    return process


@pytest.mark.parametrize(("words", "number"), [([], signal.SIGTERM), (["--now"], signal.SIGINT)])
def test_a_local_run_is_stopped_through_its_controller(
    words: list[str], number: int, tmp_path: Path, typed: Typed
) -> None:
    program = (
        "import signal; signal.pthread_sigmask(0, [15, 2]); print(flush=True); print(signal.sigwait([15, 2]))"
    )
    controller = controller_of(tmp_path, program)
    assert controller.stdout is not None
    controller.stdout.readline()
    assert f"`graftvit jobs resume {tmp_path}` resumes" in typed("jobs", "stop", tmp_path, *words).out
    assert JobFolder(tmp_path).asked_to_stop(str(controller.pid))
    assert int(controller.communicate(timeout=60)[0]) == number


ENDING = NoSuchJobError("scancel failed: error: Kill job error on job id 7: Invalid job id specified")


@pytest.mark.parametrize("error", [ENDING, SILENT])
def test_a_signal_that_could_not_be_sent(
    error: GraftError, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm, typed: Typed
) -> None:
    """A job that is ending is no failure, and its next attempt, if there is one, reads the request."""
    files = submitted(tmp_path, job_id="7")
    ends = error is ENDING
    slurm.says("COMPLETING" if ends else "RUNNING")
    monkeypatch.setattr(stop, "PAUSE", 0.0)
    monkeypatch.setattr(stop, "signal_job", failing(error))
    said = typed("jobs", "stop", tmp_path, code=0 if ends else 1)
    assert said.out == (f"job 7 of {tmp_path} is ending already\n" if ends else "")
    assert files.asked_to_stop("7") == ends
    assert jobs.describe_runs([tmp_path])[0].state == ("stopping" if ends else "running")


def test_a_run_of_another_user_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, typed: Typed
) -> None:
    folders = [tmp_path / "cells" / name for name in ("his", "mine")]
    his, mine = map(controller_of, folders)
    touch, kill = Path.touch, os.kill

    def refuse(path: Path, **kwargs: object) -> None:
        if folders[0] in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        touch(path)

    def forbid(pid: int, number: int) -> None:
        if pid == his.pid:
            raise PermissionError(1, "Operation not permitted")
        kill(pid, number)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", refuse)
        said = typed("jobs", "stop", tmp_path, code=1)
    assert f"job {mine.pid} of {folders[1]} saves" in said.out
    assert said.err.startswith(f"graftvit: error: job {his.pid} of {folders[0]} continues: ")
    assert "(Permission denied)" in said.err
    assert said.err.count("\n") == 1
    assert mine.wait(10) != 0
    monkeypatch.setattr(os, "kill", forbid)
    assert f"process {his.pid} cannot be signalled" in typed("jobs", "stop", tmp_path, code=1).err
    his.communicate("\n")


def test_several_runs_are_stopped_and_one_that_is_none_keeps_no_other_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm, typed: Typed
) -> None:
    runs = cells(tmp_path, "0", "1", "2")
    submitted(runs[0], job_id="3")  # another job of the same run
    slurm.says({"0": "PENDING", "2": "PENDING", "3": "PENDING"})
    told: list[str] = []
    monkeypatch.setattr(stop, "cancel", lambda *ids: told.extend(ids))
    assert f"{runs[1]} has no waiting or running job: it is unknown" in typed("jobs", "stop", *runs).out
    assert told == ["0", "3", "2"]
    assert "nowhere is no folder" in typed("jobs", "stop", tmp_path / "nowhere", *runs, code=2).err
    assert told == ["0", "3", "2"] * 2
    assert "RUN" in typed("jobs", "stop", code=2).err


@pytest.mark.parametrize("now", [False, True])
def test_cells_that_wait_are_cancelled_in_one_call_before_those_that_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm, typed: Typed, now: bool
) -> None:
    """Else each node that a running cell leaves is given to another cell, which is killed in its first second."""
    ids = [f"9_{place}" for place in range(6)]
    cells(tmp_path, *ids)
    slurm.says({job: "RUNNING" if job in ids[:2] else "PENDING" for job in ids})
    orders: list[tuple[str, ...]] = []
    monkeypatch.setattr(scheduler, "ask", lambda *words, **_: orders.append(words) or "")
    said = typed("jobs", "stop", tmp_path, *(["--now"] if now else []))
    signals = [("scancel", "--signal=USR2", job) for job in ids[:2]]
    assert orders == ([("scancel", *ids[2:], *ids[:2])] if now else [("scancel", *ids[2:]), *signals])
    assert said.out.count("is cancelled") == (6 if now else 4)
    assert all(JobFolder(tmp_path / "cells" / f"cell-{job}").asked_to_stop(job) for job in ids)


@pytest.mark.parametrize("error", [GraftError("Access/permission denied"), ENDING])
def test_a_cell_that_may_not_be_cancelled_or_has_just_ended_is_told_among_the_others(
    error: GraftError, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm, typed: Typed
) -> None:
    cells(tmp_path, "9_0", "9_1")
    slurm.says("PENDING")
    monkeypatch.setattr(stop, "PAUSE", 0.0)

    def refuse(*ids: str) -> None:
        if "9_1" in ids:
            raise error

    monkeypatch.setattr(stop, "cancel", refuse)
    said = typed("jobs", "stop", tmp_path, code=0 if error is ENDING else 1)
    assert said.out.count("job 9_0 of") == said.out.count("is cancelled") == 1
    assert "job 9_1" in (said.out if error is ENDING else said.err)


@pytest.mark.slurm
def test_a_suspended_job_is_shown_so_and_cancelled(
    on_cluster: SlurmCluster, tmp_path: Path, typed: Typed
) -> None:
    job = on_cluster.sbatch("sleep 100")
    files = submitted(tmp_path, job_id=job)
    until(lambda: jobs.job_states([job])[job].state == "RUNNING", "the job", every=0.2)
    on_cluster.run("scontrol", "suspend", job)
    status = jobs.describe_runs([tmp_path])[0]
    assert (status.state, status.why) == ("running", "suspended")
    files.begin(job_id=job, restart=0, nodes=["n1"], world_size=1)
    assert jobs.describe_runs([tmp_path])[0].why == "suspended"
    assert f"job {job} of {tmp_path} was suspended and is cancelled" in typed("jobs", "stop", tmp_path).out
    until(lambda: jobs.describe_runs([tmp_path])[0].state == "cancelled", "its end", every=0.2)


@pytest.mark.parametrize("number", ["", "7"])
def test_a_submission_at_this_moment_is_waited_for(
    number: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm, typed: Typed
) -> None:
    """Its job has no number yet; one that gets none continues."""
    launch = tmp_path / "jobs" / "launch-1"
    submitted(tmp_path, job_id="", launch=str(launch))
    launch.mkdir()
    slurm.says("PENDING")
    slurm.numbers()
    waited: list[Path] = []
    cancelled: list[str] = []

    @contextmanager
    def submitting(top: Path) -> Iterator[None]:
        waited.append(top)
        write_number(launch, number)
        yield

    monkeypatch.setattr(jobs, "is_submitting", lambda top: True)
    monkeypatch.setattr(stop, "submitting", submitting)
    monkeypatch.setattr(stop, "PAUSE", 0.0)
    monkeypatch.setattr(stop, "cancel", cancelled.append)
    said = typed("jobs", "stop", tmp_path, code=0 if number else 1)
    assert (waited, cancelled) == ([tmp_path], [number] if number else [])
    assert "job 7 of" in said.out if number else "continues: it has no number yet" in said.err


def test_a_job_that_was_told_to_stop_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    files = submitted(tmp_path, job_id="7")
    slurm.says("COMPLETING", "COMPLETING", "COMPLETED")
    monkeypatch.setattr(stop, "EVERY", 0.0)
    stop.wait_for_stops(tmp_path)  # it ends for another reason: nobody waits
    assert capsys.readouterr().err == ""
    files.stop_request("7").touch()
    stop.wait_for_stops(tmp_path)
    assert capsys.readouterr().err == "graftvit: waiting for job 7, which was told to stop, to end\n"
