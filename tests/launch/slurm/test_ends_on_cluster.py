"""What `graftvit jobs` says while real runs wait, run, stop, fail and end, and the reason of an end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs.patience import until
from support.slurm.cluster_runs import ALONE, cluster_run, field, held
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_a_folder_that_the_nodes_cannot_see(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = cluster_run(cluster, tmp_path)
    with held(cluster) as until_it_is_away:
        job = run.submit(*ALONE, *until_it_is_away)
        run.folder.rename(tmp_path / "away")
    until(lambda: field(cluster, job, "JobState") == "FAILED", "the end")
    (tmp_path / "away").rename(run.folder)
    why = "its nodes could not start it, as where they do not see its folder: JobLaunchFailure"
    assert why in run.wait_for_state("failed")["why"]


def test_a_copy_of_the_code_that_is_gone(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = cluster_run(cluster, tmp_path)
    with held(cluster) as until_it_is_gone:
        run.submit(*ALONE, *until_it_is_gone)
        for copy in (run.folder / "jobs").glob("code-*"):
            shutil.rmtree(copy)
    status = run.wait_for_state("failed")
    assert status["why"].startswith("the copy of the code is gone, submit again:")
    assert "the copy of the code is gone" in status["error"]


def test_the_truth_at_each_moment(start_cluster: Callable[..., SlurmCluster], tmp_path: Path) -> None:
    cluster = start_cluster()
    run = cluster_run(cluster, tmp_path, optim={"epochs": 40}, data={"batch_size": 16})
    run.submit(*ALONE)
    assert run.shown()["state"] in ("pending", "running")
    run.wait_for_lines(10)
    status = run.shown()
    assert (status["state"], status["nodes"], status["world_size"]) == ("running", [cluster.nodes[0]], 1)
    assert 0 < status["progress"]["step"] < status["progress"]["total_steps"]
    assert "saves at its next step" in run.graftvit("jobs", "stop", str(run.folder))
    run.wait_for_state("stopped")
    assert "step" in run.graftvit("jobs", "logs", str(run.folder))

    lines = run.lines()
    with held(cluster) as until_it_is_watched:
        run.graftvit("jobs", "resume", str(run.folder), *until_it_is_watched)
    run.wait_for_lines(lines + 5)
    cluster.kill_node(cluster.nodes[0])
    until(lambda: run.shown()["state"] == "requeued", "the requeue", every=0.3)
    run.finish()
    run.wait_for_state("finished")
    first, second = run.shown()["history"]
    assert first["why"] == "`graftvit jobs stop`"
    assert second["why"] == f"node failure: {cluster.nodes[0]}"
    assert "best" in run.graftvit("jobs", str(run.folder))
