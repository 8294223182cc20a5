"""What `graftvit jobs` says while real runs wait, run, stop, lose their node, fail and finish."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs.patience import until
from support.slurm.cluster_runs import ClusterRun, cluster_run, held
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ALONE = ("--nodes", "1", "--tasks_per_node", "1")


def seen(run: ClusterRun) -> dict[str, Any]:
    (status,) = json.loads(run.graftvit("jobs", str(run.folder), "--json"))
    return dict(status)


def test_the_truth_at_each_moment(start_cluster: Callable[..., SlurmCluster], tmp_path: Path) -> None:
    cluster = start_cluster()
    run = cluster_run(cluster, tmp_path, optim={"epochs": 40}, data={"batch_size": 16})
    run.submit(*ALONE)
    assert seen(run)["state"] in ("pending", "running")
    run.wait_for_lines(10)
    status = seen(run)
    assert (status["state"], status["nodes"], status["world_size"]) == ("running", [cluster.nodes[0]], 1)
    assert 0 < status["progress"]["step"] < status["progress"]["total_steps"]
    assert "saves at its next step" in run.graftvit("stop", str(run.folder))
    until(lambda: seen(run)["state"] == "stopped", "the stop", every=1.0)
    assert "step" in run.graftvit("logs", str(run.folder))

    lines = run.lines()
    with held(cluster) as until_it_is_watched:
        run.graftvit("resume", str(run.folder), *until_it_is_watched)
    run.wait_for_lines(lines + 5)
    cluster.kill_node(cluster.nodes[0])
    until(lambda: seen(run)["state"] == "requeued", "the requeue", every=0.3)
    run.finish()
    until(lambda: seen(run)["state"] == "finished", "the end", every=1.0)
    first, second = seen(run)["restarts"]
    assert first["why"] == "`graftvit stop`"
    assert second["why"] == f"node failure: {cluster.nodes[0]}"
    assert "best" in run.graftvit("jobs", str(run.folder))


def test_a_failure_is_told_with_its_words(start_cluster: Callable[..., SlurmCluster], tmp_path: Path) -> None:
    run = cluster_run(start_cluster(accounting=True), tmp_path)
    with held(run.cluster) as until_it_is_gone:
        run.submit(*ALONE, *until_it_is_gone)
        (tmp_path / "teacher").rename(tmp_path / "gone")
    until(lambda: seen(run)["state"] == "failed", "the failure", every=1.0)
    status = seen(run)
    assert status["error_rank"] == 0
    assert "teacher" in status["error"]
    assert f"last words of rank 0:\n  {status['error'].splitlines()[0]}" in run.graftvit(
        "jobs", str(run.folder)
    )
