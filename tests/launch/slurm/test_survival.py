"""What happens to jobs happens to a run in the middle of its training; its result is that of an undisturbed one."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs.patience import until
from support.slurm.cluster_runs import ClusterRun, assert_undisturbed, cluster_run, interrupt, tasks_of
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
StartCluster = Callable[..., SlurmCluster]
EARLY = 10
"""Records of the log after which something happens, of about 50."""


def preempt(run: ClusterRun) -> None:
    """A job of a higher partition that needs all nodes, for a moment."""
    nodes = str(len(run.cluster.nodes))
    run.cluster.run("sbatch", "-p", "high", "-N", nodes, "--ntasks-per-node=1", "--cpus-per-task=8",
                    "-o", "/dev/null", "--wrap", "sleep 1")  # fmt: skip


def meet_the_time_limit(run: ClusterRun, job: str, started: float) -> None:
    """A limit is whole minutes, and Slurm looks every 30 s: the tasks stand still until it has signaled."""
    minutes = math.ceil((time.monotonic() - started + 30) / 60)
    run.cluster.run("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")
    tasks = tasks_of(job)
    assert len(tasks) == 2
    for task in tasks:
        os.kill(task, signal.SIGSTOP)
    until(lambda: run.jobs.attempts()[0].outcome, "Slurm signaling, and continuing, the tasks")
    run.wait_for_attempt(2)
    run.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=60")


def test_four_events_in_one_run(start_cluster: StartCluster, tmp_path: Path) -> None:
    """Its time limit, a job of a higher partition, the death of the node with the batch script, and `scancel`."""
    run = cluster_run(start_cluster(user_signal=True, grace=6), tmp_path)
    started = time.monotonic()
    job = run.submit("--signal_delay", "60")
    run.wait_for_lines(EARLY)
    meet_the_time_limit(run, job, started)
    run.wait_for_lines(EARLY + 6)
    preempt(run)
    run.wait_for_attempt(3)
    run.wait_for_lines(EARLY + 12)
    dead = run.jobs.attempts()[2].nodes[0]
    run.cluster.kill_node(dead)
    run.wait_for_attempt(4)
    run.wait_for_lines(EARLY + 18)
    run.cluster.run("scancel", job)
    until(lambda: not run.cluster.run("squeue", "-h").strip(), "the end of the job", every=0.5)
    limited, preempted, lost, cancelled = run.jobs.attempts()
    assert (limited.outcome, limited.signal) == ("requeued", "SIGUSR2 (time limit)")
    assert preempted.outcome == "requeued"
    assert preempted.signal.startswith("SIGUSR2")
    assert "preempted" in preempted.signal
    assert lost.outcome is None  # the first rank went with its node
    assert dead not in cancelled.nodes
    assert cancelled.before == f"node failure: {dead}"
    assert cancelled.signal == "SIGTERM (cancelled)"
    run.graftvit("resume", str(run.folder))
    assert run.finish()[-1].outcome == "finished"
    assert_undisturbed(run)


def test_four_other_events_in_one_run(
    start_cluster: StartCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requeue, a preemption without the signal that the job asked for, the death of another node, an interrupt."""
    run = cluster_run(start_cluster(user_signal=False, grace=6), tmp_path)
    job = run.submit()
    run.wait_for_lines(EARLY)
    run.cluster.run("scontrol", "requeue", job)
    run.wait_for_attempt(2)
    run.wait_for_lines(EARLY + 6)
    preempt(run)
    run.wait_for_attempt(3)
    run.wait_for_lines(EARLY + 12)
    dead = run.jobs.attempts()[2].nodes[1]
    run.cluster.kill_node(dead)
    run.wait_for_attempt(4)
    run.wait_for_lines(EARLY + 18)
    interrupt(run, job, monkeypatch)
    attempts = run.finish()
    requeued, preempted, lost, interrupted, last = attempts
    assert [(attempt.job_id, attempt.restart) for attempt in attempts] == [
        (job, number) for number in range(5)
    ]
    assert [(attempt.world_size, len(attempt.nodes)) for attempt in attempts] == [(2, 2)] * 5
    assert requeued.signal == "SIGTERM (requeued)"
    assert preempted.signal.startswith("SIGTERM")
    assert "preempted" in preempted.signal
    assert preempted.outcome is None
    assert lost.outcome in (None, "failed")  # Slurm may end the first rank before that misses the others
    assert dead not in interrupted.nodes
    assert interrupted.before == f"node failure: {dead}" or lost.outcome == "failed"
    assert interrupted.outcome == "requeued"
    assert interrupted.signal.startswith("SIGUSR2")
    assert last.outcome == "finished"
    assert_undisturbed(run)
