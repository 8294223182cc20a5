"""The reason of an end on a real cluster is the scheduler's, where it has one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.slurm import scheduler as ask
from graftvit.launch.slurm.jobs import describe_runs, judge_jobs
from graftvit.models.errors import GraftError
from support.runs.patience import until
from support.slurm.cluster_runs import ClusterRun, cluster_run, held, tasks_of
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_folders import submitted

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ALONE = ("--nodes", "1", "--tasks_per_node", "1")


def seen(run: ClusterRun) -> dict[str, Any]:
    (status,) = json.loads(run.graftvit("jobs", str(run.folder), "--json"))
    return dict(status)


def seen_when(run: ClusterRun, state: str) -> dict[str, Any]:
    until(lambda: seen(run)["state"] == state, lambda: f"{state}: {seen(run)}\n{run.logs()}", every=1.0)
    return seen(run)


def rank_of(pid: int) -> str:
    words = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next(word.partition("=")[2] for word in words if word.startswith("SLURM_PROCID="))


def test_a_rank_that_the_system_kills_and_no_neighbor_is_to_blame(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    run = cluster_run(cluster, tmp_path, optim={"epochs": 100})
    job = run.submit("--nodes", "2", "--tasks_per_node", "1", "--max_restarts", "0")
    run.wait_for_lines(2)
    os.kill(next(pid for pid in tasks_of(job) if rank_of(pid) == "1"), signal.SIGKILL)
    status = seen_when(run, "failed")
    assert status["why"].startswith(f"rank 1 on {cluster.nodes[1]} was killed (signal 9)")
    assert (status["error_rank"], "Killed" in status["error"]) == (1, True)


def test_a_node_that_dies_is_the_reason_though_a_rank_elsewhere_speaks(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    run = cluster_run(cluster, tmp_path, optim={"epochs": 100})
    run.submit("--nodes", "2", "--tasks_per_node", "1", "--max_restarts", "0")
    run.wait_for_lines(2)
    dead = seen(run)["nodes"][1]
    cluster.kill_node(dead, tell=False)
    until(lambda: run.jobs.attempts()[0].outcome == "failed", lambda: f"the words of rank 0\n{run.logs()}")
    assert "lost another" in seen(run)["why"]  # nobody knows of the node yet
    cluster.run("scontrol", "update", f"nodename={dead}", "state=down", "reason=killed")
    run.wait_for_attempt(2)
    assert seen(run)["restarts"][0]["why"] == f"node failure: {dead}"
    run.graftvit("stop", str(run.folder), "--now")
    cluster.start_node(dead)


def test_a_folder_that_the_nodes_cannot_see(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = cluster_run(cluster, tmp_path)
    with held(cluster) as until_it_is_away:
        job = run.submit(*ALONE, *until_it_is_away)
        run.folder.rename(tmp_path / "away")
    until(
        lambda: "FAILED" in cluster.run("squeue", "-h", "--states=all", f"--jobs={job}", "-o", "%T"),
        "the end",
    )
    (tmp_path / "away").rename(run.folder)
    status = seen_when(run, "failed")
    assert (
        f"most often they do not see {run.folder} or may not write there: JobLaunchFailure" in status["why"]
    )


def test_a_copy_of_the_code_that_is_gone(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = cluster_run(cluster, tmp_path)
    with held(cluster) as until_it_is_gone:
        run.submit(*ALONE, *until_it_is_gone)
        for copy in (run.folder / "jobs").glob("code-*"):
            shutil.rmtree(copy)
    status = seen_when(run, "failed")
    assert status["why"].startswith("the copy of the code is gone, submit again:")
    assert "the copy of the code is gone" in status["error"]


def test_a_controller_that_is_away_leaves_what_the_files_say(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setattr(ask, "_silent", {})
    job = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 200").strip()
    until(
        lambda: "RUNNING" in cluster.run("squeue", "-h", f"--jobs={job}", "-o", "%T"), "the start", every=0.2
    )
    files = submitted(tmp_path / "run", job_id=job)
    files.begin(job_id=job, restart=0, nodes=["n1"], world_size=1)
    cluster.stop_controller()
    (status,) = describe_runs([tmp_path / "run"], tries=1)
    assert (status.state, status.over) == ("unknown", False)
    assert status.problem.startswith("Slurm does not answer")
    with pytest.raises(GraftError, match="Slurm does not answer"):
        judge_jobs([tmp_path / "run"], strict=True)
    cluster.start_controller()
    monkeypatch.setattr(ask, "_silent", {})
    assert describe_runs([tmp_path / "run"])[0].state == "running"
    cluster.run("scancel", job)
