"""Runs that wait for other runs, and lines that run once on each node, on a real Slurm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs.patience import until
from support.slurm.cluster_runs import cluster_run, held
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ALONE = ("--nodes", "1", "--tasks_per_node", "1")
SHORT = {"optim": {"max_steps": 20}}


def field(cluster: SlurmCluster, job: str, name: str) -> str:
    words = cluster.run("scontrol", "--oneliner", "show", "job", job).split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


def test_what_waits_for_a_run_that_is_stopped_is_cancelled(cluster: SlurmCluster, tmp_path: Path) -> None:
    first = cluster_run(cluster, tmp_path, "first", optim={"epochs": 4000}, data={"batch_size": 16})
    second = cluster_run(cluster, tmp_path, "second", **SHORT)
    after = ("--after", str(first.folder))
    before = first.submit(*ALONE)
    job = second.submit(*ALONE, *after)
    assert field(cluster, job, "Dependency") == f"afterok:{before}(unfulfilled)"
    first.wait_for_lines(1)
    first.graftvit("stop", str(first.folder))  # it has not finished, though it ends without an error
    until(lambda: field(cluster, job, "JobState") == "CANCELLED", lambda: cluster.run("squeue"), every=0.5)
    assert not second.jobs.attempts()
    said = first.graftvit("resume", str(second.folder), *after, code=2)
    assert f"--after {first.folder}: {first.folder} has neither finished nor a job that could: " in said


def test_a_run_begins_when_another_has_finished(cluster: SlurmCluster, tmp_path: Path) -> None:
    first = cluster_run(cluster, tmp_path, "first", **SHORT)
    second = cluster_run(cluster, tmp_path, "second", **SHORT)
    after = ("--after", str(first.folder))
    with held(cluster) as until_it_is_watched:
        before = first.submit(*ALONE, *until_it_is_watched)
        job = second.submit(*ALONE, *after)
    first.wait_for_attempt(1)
    cluster.run("scontrol", "requeue", before)  # the same number goes on
    (attempt,) = second.finish()
    last = first.jobs.attempts()[-1]
    assert (last.job_id, last.restart, last.outcome) == (before, 1, "finished")
    assert last.ended is not None
    assert attempt.started >= last.ended
    third = cluster_run(cluster, tmp_path, "third", **SHORT)
    job = third.submit(*ALONE, *after, "--sbatch", "hold")  # nothing is left to wait for
    assert field(cluster, job, "Dependency") == "(null)"
    cluster.run("scancel", job)


def test_lines_that_run_once_on_each_node(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = cluster_run(cluster, tmp_path, optim={"max_steps": 5})
    seen = tmp_path / "seen"
    lines = ["export HERE='a \"b\" c'", f'echo "$SLURM_NODEID $SLURM_CPUS_PER_TASK $HERE" >> {seen}']
    words = [word for line in lines for word in ("--node_setup", line)]
    run.submit("--tasks_per_node", "2", "--setup", "export FIRST=1", *words)
    run.finish()
    assert sorted(seen.read_text().splitlines()) == ['0 2 a "b" c', '1 2 a "b" c']  # of two processes a node


def test_a_line_that_fails_on_a_node_ends_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = cluster_run(cluster, tmp_path, **SHORT)
    job = run.submit("--node_setup", '[ "$SLURM_NODEID" = 0 ] || ls /no-such-folder', "--node_setup", "true")
    until(lambda: field(cluster, job, "JobState") == "FAILED", lambda: cluster.run("squeue"), every=0.5)
    assert not run.jobs.attempts()
    assert "/no-such-folder" in run.logs()


def test_a_job_that_is_preempted_in_its_lines_is_started_again(
    start_cluster: Callable[..., SlurmCluster], tmp_path: Path
) -> None:
    cluster = start_cluster(user_signal=True, grace=1)
    run = cluster_run(cluster, tmp_path, **SHORT)
    once = tmp_path / "once"
    job = run.submit("--node_setup", f"[ -e {once} ] || {{ touch {once}; sleep 60; }}")
    until(once.exists, lambda: cluster.run("squeue"))
    cluster.run("sbatch", "-p", "high", "-N", "3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    run.finish()
    assert field(cluster, job, "Restarts") == "1"
