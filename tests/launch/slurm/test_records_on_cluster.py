"""Submissions that are interrupted, doubled or lost, and removed folders: each job is known and can be stopped."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from graftvit.launch.cli import main
from graftvit.launch.slurm import scheduler
from support.runs.commands import Command
from support.runs.patience import until
from support.slurm.cluster_runs import (
    ALONE,
    ClusterRun,
    cluster_run,
    held,
    user_environment,
    wait_for_the_end,
)
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
AT_ONCE = (*ALONE, "--unchecked")


@pytest.fixture
def run(cluster: SlurmCluster, tmp_path: Path) -> Iterator[ClusterRun]:
    """One that was not submitted yet; its jobs end with the test."""
    yield cluster_run(cluster, tmp_path, optim={"epochs": 200}, data={"batch_size": 16})
    cluster.run("scancel", "--me")
    wait_for_the_end(cluster)


def queue(cluster: SlurmCluster) -> list[str]:
    """The jobs of graftvit that wait or run."""
    lines = cluster.run("squeue", "--noheader", "--format=%i %j").splitlines()
    return [line.split()[0] for line in lines if line.split()[1].startswith("graftvit-")]


@contextmanager
def slow_sbatch(run: ClusterRun, before: float = 0.0, after: float = 0.0) -> Iterator[Path]:
    """An sbatch that takes its time before and after it submits; yields the file that it makes in between."""
    folder, done = run.root / "slow", run.root / "slow" / "submitted"
    folder.mkdir(exist_ok=True)
    done.unlink(missing_ok=True)
    path = run.cluster.environment["PATH"]
    real = shutil.which("sbatch", path=path)
    (folder / "sbatch").write_text(
        f'#!/bin/sh\ncase "$*" in *--test-only*) exec {real} "$@";; esac\n'
        f'touch {done}.begun\nsleep {before}\n{real} "$@"; code=$?\n'
        f"touch {done}\nsleep {after} >/dev/null 2>&1\nexit $code\n"
    )
    (folder / "sbatch").chmod(0o755)
    run.cluster.environment["PATH"] = f"{folder}:{path}"
    try:
        yield done
    finally:
        run.cluster.environment["PATH"] = path


def begin(run: ClusterRun, *words: str) -> Command:
    """A command in a terminal of its own, whose signals nobody has told to be ignored."""
    return Command(words, user_environment(run.cluster, run.root), run.root)


def assert_known(run: ClusterRun, job: str) -> None:
    """All commands know the job, and `stop` ends it."""
    assert run.shown()["job_id"] == job
    for words in (("jobs", "resume", str(run.folder)), ("submit", run.recipe(), *AT_ONCE)):
        assert f"is job {job} already" in run.graftvit(*words, code=2)
    assert queue(run.cluster) == [job]
    assert f"job {job} of {run.folder}" in run.graftvit("jobs", "stop", str(run.folder), "--now")
    until(lambda: not queue(run.cluster), "the end of the job", every=0.2)


def test_of_two_submissions_and_resumptions_at_once_one_is_queued(run: ClusterRun) -> None:
    words = ("submit", run.recipe(), *AT_ONCE)
    with held(run.cluster) as waiting:
        for command in (words, ("jobs", "resume", str(run.folder), "--unchecked")):
            with slow_sbatch(run, before=1.0):
                processes = [begin(run, *command, *waiting) for _ in range(2)]
                said = [process.communicate()[1] for process in processes]
            (refused,) = [err for err, process in zip(said, processes, strict=True) if process.returncode]
            (job,) = queue(run.cluster)
            # the one that comes later may look while the other one waits for its number
            assert f"is job {job} already" in refused or "that is being submitted already" in refused
            assert_known(run, job)


def submit_and_be_killed(run: ClusterRun, after: float, *words: str) -> None:
    """Behind sbatch, before it can write the number down."""
    with slow_sbatch(run, after=after) as submitted:
        process = begin(run, "submit", run.recipe(), *AT_ONCE, *words)
        until(submitted.exists, "the job")
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_submission_that_is_killed_behind_sbatch_has_a_job_that_all_know(run: ClusterRun) -> None:
    with held(run.cluster) as waiting:
        submit_and_be_killed(run, 3.0, *waiting)
        (job,) = queue(run.cluster)
        assert str(run.folder) in run.graftvit("jobs")
        assert_known(run, job)


def test_a_job_whose_submission_was_killed_runs_to_its_end(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = cluster_run(cluster, tmp_path, optim={"epochs": 1}, data={"batch_size": 16})
    submit_and_be_killed(run, 2.0)
    (attempt,) = run.finish()
    assert run.wait_for_state("finished")["job_id"] == attempt.job_id


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_terminal_that_ends_sbatch_cuts_no_submission(run: ClusterRun, number: signal.Signals) -> None:
    with held(run.cluster) as waiting, slow_sbatch(run, before=1.0, after=1.0) as submitted:
        process = begin(run, "submit", run.recipe(), *AT_ONCE, *waiting)
        until(submitted.with_suffix(".begun").exists, "the order")
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=600)
        assert submitted.exists()
        (job,) = queue(run.cluster)
        assert process.returncode == 128 + number
        assert f"{number.name} came while job {job} was being submitted, and it was" in said
        assert f"`graftvit jobs stop {run.folder}` ends it" in said
        assert f"job {job} of {run.folder} was pending" in run.graftvit("jobs", "stop", str(run.folder))


def test_a_silent_controller_is_no_job_that_has_ended(
    run: ClusterRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = run.submit(*AT_ONCE)
    for name, value in run.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(scheduler, "ask", partial(scheduler.ask, tries=1))
    run.cluster.stop_controller()
    try:
        assert main(["jobs", "stop", str(run.folder)]) != 0
        assert "Slurm does not answer" in capsys.readouterr().err
    finally:
        run.cluster.start_controller()
    assert queue(run.cluster) == [job]
    # another process: this one leaves a silent controller alone
    run.graftvit("jobs", "stop", str(run.folder), "--now")


def remove(folder: Path) -> None:
    """As `rm -rf` does, told again where the run has written something in between."""

    def gone() -> bool:
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()

    until(gone, f"{folder} to be gone")


@pytest.mark.parametrize("moves", [False, True])
def test_a_run_whose_folder_is_removed_or_moved_ends_and_makes_no_other(run: ClusterRun, moves: bool) -> None:
    run.submit(*AT_ONCE)
    run.wait_for_lines(3)
    moved = run.root / "moved"
    if moves:
        run.folder.rename(moved)
    else:
        remove(run.folder)
    wait_for_the_end(run.cluster)
    assert not run.folder.exists()
    if moves:
        log = next((moved / "jobs" / "logs").glob("*_0_log.err")).read_text()
        assert f"{run.folder} is not there any more: it was moved or removed" in log
        assert "taken over" not in log
        assert "was never submitted" in run.graftvit("jobs", str(moved), code=2)  # and may be again
