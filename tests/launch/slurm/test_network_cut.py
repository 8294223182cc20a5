"""A node that lost its network but not the shared folder: two attempts of one job run, and one of them writes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs.patience import until
from support.slurm.cluster_runs import assert_undisturbed, cluster_run, tasks_of
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_the_orphaned_attempt_is_fenced_off(
    start_cluster: Callable[..., SlurmCluster], tmp_path: Path
) -> None:
    cluster = start_cluster(mode="ns", nodes=2)
    run = cluster_run(cluster, tmp_path, optim={"epochs": 16})
    run.submit("--nodes", "1", "--tasks_per_node", "2")
    run.wait_for_lines(12)
    (orphan,) = run.jobs.attempts()
    cluster.cut_node(orphan.nodes[0])
    before = run.lines()
    until(lambda: run.lines() > before, "the orphan writing on")
    tasks = tasks_of(orphan.job_id)
    assert len(tasks) == 2
    for task in tasks:  # stand still, lest they end before their successor has loaded
        os.kill(task, signal.SIGSTOP)
    cluster.run("scontrol", "update", f"nodename={orphan.nodes[0]}", "state=down", "reason=cut")
    run.wait_for_attempt(2)
    written = run.lines()
    until(lambda: run.lines() != written, "the successor writing")
    for task in tasks:
        os.kill(task, signal.SIGCONT)
    successor = run.finish()[1]
    assert (successor.job_id, successor.nodes) == (
        orphan.job_id,
        [n for n in cluster.nodes if n not in orphan.nodes],
    )
    until(
        lambda: "has taken over the run" in "".join(one.text for one in run.jobs.failures(orphan.name)),
        lambda: f"the orphan's end: {run.jobs.failures(orphan.name)}",
    )
    assert run.jobs.attempts()[0].outcome == "failed"
    assert f"of job {orphan.job_id}" in run.jobs.failures(orphan.name)[0].text
    assert_undisturbed(run)
