"""What happens to jobs happens to a run in the middle of its training; its result is that of an undisturbed one."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import submitit
from cluster_runs import ClusterRun, assert_undisturbed, cluster_run, tasks_of
from patience import until
from slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
StartCluster = Callable[..., SlurmCluster]
EARLY, LATE = 10, 20
"""Records of the log after which something happens, of about 50."""


def interrupt(run: ClusterRun, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM and SIGUSR2, as submitit imitates preemption."""
    for name, value in run.cluster.environment.items():
        monkeypatch.setenv(name, value)
    submitit.SlurmJob(folder=run.folder / "jobs" / "logs", job_id=job, tasks=[0])._interrupt()


def preempt(run: ClusterRun) -> None:
    """A job of a higher partition that needs all nodes, for a moment."""
    nodes = str(len(run.cluster.nodes))
    run.cluster.run("sbatch", "-p", "high", "-N", nodes, "--ntasks-per-node=1", "--cpus-per-task=8",
                    "-o", "/dev/null", "--wrap", "sleep 1")  # fmt: skip


def test_interrupt_in_the_middle(
    start_cluster: StartCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cluster_run(start_cluster(), tmp_path)
    job = run.submit("--tasks_per_node", "2")
    run.wait_for_lines(EARLY)
    interrupt(run, job, monkeypatch)
    first, second = run.finish()
    assert (first.outcome, second.outcome) == ("requeued", "finished")
    assert first.signal.startswith("SIGUSR2")
    assert (first.job_id, first.restart, second.restart) == (job, 0, 1)
    assert first.world_size == 4
    assert len(first.nodes) == 2
    assert_undisturbed(run, ranks=4)


@pytest.mark.parametrize("user_signal", [True, False])
def test_preemption_by_a_higher_partition(
    start_cluster: StartCluster, tmp_path: Path, user_signal: bool
) -> None:
    run = cluster_run(start_cluster(user_signal=user_signal, grace=6), tmp_path)
    run.submit()
    run.wait_for_lines(EARLY)
    preempt(run)
    first, second = run.finish()
    assert second.outcome == "finished"
    assert "preempted" in first.signal
    assert first.signal.startswith("SIGUSR2" if user_signal else "SIGTERM")
    assert first.outcome == ("requeued" if user_signal else None)
    assert_undisturbed(run)


def test_the_time_limit(start_cluster: StartCluster, tmp_path: Path) -> None:
    # A limit is whole minutes, and Slurm looks every 30 s: the tasks stand still until it has signalled.
    run = cluster_run(start_cluster(), tmp_path)
    started = time.monotonic()
    job = run.submit("--signal_delay", "60")
    run.wait_for_lines(EARLY)
    minutes = math.ceil((time.monotonic() - started + 30) / 60)
    run.cluster.run("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")
    tasks = tasks_of(job)
    assert len(tasks) == 2
    for task in tasks:
        os.kill(task, signal.SIGSTOP)
    until(lambda: run.jobs.attempts()[0].outcome, "Slurm signalling, and continuing, the tasks")
    run.wait_for_attempt(2)
    run.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=60")
    first, second = run.finish()
    assert (first.outcome, first.signal, second.outcome) == ("requeued", "SIGUSR2 (time limit)", "finished")
    assert_undisturbed(run)


def test_the_death_of_the_node_with_the_batch_script(start_cluster: StartCluster, tmp_path: Path) -> None:
    run = cluster_run(start_cluster(), tmp_path)
    run.submit()
    run.wait_for_lines(EARLY)
    dead = run.jobs.attempts()[0].nodes[0]
    run.cluster.kill_node(dead)
    first, second = run.finish()
    assert second.outcome == "finished"
    assert first.outcome is None  # the first rank went with its node
    assert dead not in second.nodes
    assert second.before == f"node failure: {dead}"
    assert_undisturbed(run)


def test_three_events_in_one_run(
    start_cluster: StartCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An administrator's requeue, the death of a node that is not the batch script's, and an interrupt."""
    run = cluster_run(start_cluster(), tmp_path)
    job = run.submit()
    run.wait_for_lines(EARLY)
    run.cluster.run("scontrol", "requeue", job)
    run.wait_for_attempt(2)
    run.wait_for_lines(LATE)
    dead = run.jobs.attempts()[1].nodes[1]
    run.cluster.kill_node(dead)
    run.wait_for_attempt(3)
    run.wait_for_lines(LATE + 10)
    interrupt(run, job, monkeypatch)
    attempts = run.finish()
    requeued, lost, interrupted, last = attempts
    assert [attempt.restart for attempt in attempts] == [0, 1, 2, 3]
    assert requeued.signal == "SIGTERM (requeued)"
    assert lost.outcome in (None, "failed")  # Slurm may end the first rank before that misses the others
    assert dead not in interrupted.nodes
    assert interrupted.before == f"node failure: {dead}" or lost.outcome == "failed"
    assert interrupted.outcome == "requeued"
    assert interrupted.signal.startswith("SIGUSR2")
    assert last.outcome == "finished"
    assert_undisturbed(run)


def test_an_administrator_cancels(start_cluster: StartCluster, tmp_path: Path) -> None:
    run = cluster_run(start_cluster(), tmp_path)
    job = run.submit()
    run.wait_for_lines(EARLY)
    run.cluster.run("scancel", job)
    until(lambda: not run.cluster.run("squeue", "-h").strip(), "the end of the job", every=0.5)
    (only,) = run.jobs.attempts()
    assert only.signal == "SIGTERM (cancelled)"
    run.graftvit("resume", str(run.folder))
    assert run.finish()[-1].outcome == "finished"
    assert_undisturbed(run)
