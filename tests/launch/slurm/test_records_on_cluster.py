"""Submissions that are interrupted, doubled or lost, on a real cluster: no job is unknown, and each can be stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from graftvit.launch.cli import main
from graftvit.launch.slurm import scheduler
from support.runs.commands import Command
from support.runs.patience import until
from support.slurm.cluster_runs import ClusterRun, cluster_run, held, user_environment
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_folders import submitted

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ALONE = ("--nodes", "1", "--tasks_per_node", "1", "--unchecked")


@pytest.fixture
def run(cluster: SlurmCluster, tmp_path: Path) -> Iterator[ClusterRun]:
    """One that was not submitted yet; its jobs end with the test."""
    yield cluster_run(cluster, tmp_path, optim={"epochs": 200}, data={"batch_size": 16})
    cluster.run("scancel", "--me")
    until(lambda: not queue(cluster), "the end of all jobs", every=0.2)


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


def recipe(run: ClusterRun) -> str:
    path = run.root / "run.yaml"
    path.write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
    return str(path)


def shown(run: ClusterRun) -> dict[str, Any]:
    (status,) = json.loads(run.graftvit("jobs", str(run.folder), "--json"))
    return dict(status)


def end_together(processes: Sequence[Command]) -> list[str]:
    """What those say on standard error that fail."""
    ended = [(process.communicate(), process.returncode) for process in processes]
    return [said[1] for said, code in ended if code]


def assert_known(run: ClusterRun, job: str) -> None:
    """All commands know the job, and `stop` ends it."""
    assert shown(run)["job_id"] == job
    for words in (("resume", str(run.folder)), ("submit", recipe(run), *ALONE)):
        assert f"is job {job} already" in run.graftvit(*words, code=2)
    assert queue(run.cluster) == [job]
    assert f"job {job} of {run.folder}" in run.graftvit("stop", str(run.folder), "--now")
    until(lambda: not queue(run.cluster), "the end of the job", every=0.2)


def test_of_two_submissions_and_resumptions_at_once_one_is_queued(run: ClusterRun) -> None:
    words = ("submit", recipe(run), *ALONE)
    with held(run.cluster) as waiting:
        for command in (words, ("resume", str(run.folder), "--unchecked")):
            with slow_sbatch(run, before=1.0):
                (refused,) = end_together([begin(run, *command, *waiting) for _ in range(2)])
            (job,) = queue(run.cluster)
            # the one that comes later may look while the other one waits for its number
            assert f"is job {job} already" in refused or "that is being submitted already" in refused
            assert_known(run, job)


def test_a_submission_that_is_killed_behind_sbatch_has_a_job_that_all_know(run: ClusterRun) -> None:
    with held(run.cluster) as waiting:
        with slow_sbatch(run, after=3.0) as submitted:
            process = begin(run, "submit", recipe(run), *ALONE, *waiting)
            until(submitted.exists, "the job")
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        (job,) = queue(run.cluster)
        assert str(run.folder) in run.graftvit("jobs")
        assert_known(run, job)


def test_a_job_whose_submission_was_killed_runs_to_its_end(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = cluster_run(cluster, tmp_path, optim={"epochs": 1}, data={"batch_size": 16})
    with slow_sbatch(run, after=2.0) as submitted:
        process = begin(run, "submit", recipe(run), *ALONE)
        until(submitted.exists, "the job")
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    (attempt,) = run.finish()
    until(lambda: shown(run)["state"] == "finished", "the end", every=0.5)
    assert shown(run)["job_id"] == attempt.job_id


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_terminal_that_ends_sbatch_cuts_no_submission(run: ClusterRun, number: signal.Signals) -> None:
    with held(run.cluster) as waiting, slow_sbatch(run, before=1.0, after=1.0) as submitted:
        process = begin(run, "submit", recipe(run), *ALONE, *waiting)
        until(submitted.with_suffix(".begun").exists, "the order")
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=60)
        assert submitted.exists()
        (job,) = queue(run.cluster)
        assert process.returncode == 128 + number
        assert f"{number.name} came while job {job} was being submitted, and it was" in said
        assert f"`graftvit stop {run.folder}` ends it" in said
        assert f"job {job} of {run.folder} was pending" in run.graftvit("stop", str(run.folder))


def test_a_run_without_its_records_is_still_known(run: ClusterRun) -> None:
    job = run.submit(*ALONE)
    run.wait_for_lines(3)
    shutil.rmtree(run.folder / "jobs")
    assert_known(run, job)


def test_all_jobs_of_a_run_are_stopped(run: ClusterRun) -> None:
    words = ("sbatch", "--parsable", "--output=/dev/null", "--job-name=graftvit-x", "--wrap", "sleep 100")
    first, second = (run.cluster.run(*words).strip() for _ in range(2))
    for job in (first, second):
        submitted(run.folder, job_id=job)
    said = run.graftvit("stop", str(run.folder), "--now")
    assert [line.split()[1] for line in said.splitlines()] == [first, second]
    until(lambda: not queue(run.cluster), "the end of both", every=0.2)


def test_a_silent_controller_is_no_job_that_has_ended(
    run: ClusterRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = run.submit(*ALONE)
    for name, value in run.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(scheduler, "ask", partial(scheduler.ask, tries=1))
    run.cluster.stop_controller()
    try:
        assert main(["stop", str(run.folder)]) != 0
        assert "Slurm does not answer" in capsys.readouterr().err
    finally:
        run.cluster.start_controller()
    assert queue(run.cluster) == [job]
    run.graftvit(
        "stop", str(run.folder), "--now"
    )  # another process: this one leaves a silent controller alone
