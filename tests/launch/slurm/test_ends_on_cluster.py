"""What `graftvit jobs` says while real runs wait, run, stop, fail and end, and the reason of an end."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from graftvit.launch.slurm import scheduler as ask
from graftvit.launch.slurm.jobs import describe_runs, judge_jobs
from graftvit.models.errors import GraftError
from support.runs.patience import until
from support.slurm.cluster_runs import ALONE, cluster_run, field, held, tasks_of
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_folders import submitted

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


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
    status = run.wait_for_state("failed")
    assert status["why"].startswith(f"rank 1 on {cluster.nodes[1]} was killed (signal 9)")
    assert (status["error_rank"], "Killed" in status["error"]) == (1, True)


def test_a_node_that_dies_is_the_reason_though_a_rank_elsewhere_speaks(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    run = cluster_run(cluster, tmp_path, optim={"epochs": 100})
    run.submit("--nodes", "2", "--tasks_per_node", "1", "--max_restarts", "0")
    run.wait_for_lines(2)
    dead = run.shown()["nodes"][1]
    cluster.kill_node(dead, tell=False)
    until(lambda: run.jobs.attempts()[0].outcome == "failed", lambda: f"the words of rank 0\n{run.logs()}")
    assert "lost another" in run.shown()["why"]  # nobody knows of the node yet
    cluster.run("scontrol", "update", f"nodename={dead}", "state=down", "reason=killed")
    run.wait_for_attempt(2)
    assert run.shown()["history"][0]["why"] == f"node failure: {dead}"
    run.graftvit("jobs", "stop", str(run.folder), "--now")
    cluster.start_node(dead)


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


def test_a_controller_that_is_away_leaves_what_the_files_say(
    on_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = on_cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 200").strip()
    until(lambda: field(on_cluster, job, "JobState") == "RUNNING", "the start", every=0.2)
    files = submitted(tmp_path / "run", job_id=job)
    files.begin(job_id=job, restart=0, nodes=["n1"], world_size=1)
    on_cluster.stop_controller()
    (status,) = describe_runs([tmp_path / "run"], tries=1)
    assert (status.state, status.over) == ("unknown", False)
    assert status.problem.startswith("Slurm does not answer")
    with pytest.raises(GraftError, match="Slurm does not answer"):
        judge_jobs([tmp_path / "run"], strict=True)
    on_cluster.start_controller()
    monkeypatch.setattr(ask, "_silent", {})
    assert describe_runs([tmp_path / "run"])[0].state == "running"
    on_cluster.run("scancel", job)


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


def test_a_failure_is_told_with_its_words(start_cluster: Callable[..., SlurmCluster], tmp_path: Path) -> None:
    run = cluster_run(start_cluster(accounting=True), tmp_path)
    with held(run.cluster) as until_it_is_gone:
        run.submit(*ALONE, *until_it_is_gone)
        (tmp_path / "teacher").rename(tmp_path / "gone")
    status = run.wait_for_state("failed")
    assert status["error_rank"] == 0
    assert "teacher" in status["error"]
    assert f"last words of rank 0:\n  {status['error'].splitlines()[0]}" in run.graftvit(
        "jobs", str(run.folder)
    )
