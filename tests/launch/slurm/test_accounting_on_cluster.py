"""What commands do on a cluster with a database of all jobs: while it is away, and after the queue has forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.launch.slurm.jobs import describe_run
from support.runs.patience import until
from support.runs.typed import Typed
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_config import ClusterOptions
from support.slurm.slurm_folders import submitted

pytestmark = pytest.mark.slurm
CLUSTER = ClusterOptions(accounting=True, min_job_age=2)


def sbatch(cluster: SlurmCluster, command: str, *flags: str) -> str:
    return cluster.run("sbatch", "--parsable", "--output=/dev/null", *flags, "--wrap", command).strip()


def queued(cluster: SlurmCluster) -> str:
    return cluster.run("squeue", "--noheader", "--format=%i %T")


def test_jobs_are_stopped_and_resumed_while_the_accounting_is_away(
    on_cluster: SlurmCluster, tmp_path: Path, typed: Typed
) -> None:
    waits, runs = sbatch(on_cluster, "sleep 900", "--hold"), sbatch(on_cluster, "sleep 900")
    for name, job in (("waits", waits), ("runs", runs)):
        submitted(tmp_path / name, job_id=job)
    until(lambda: f"{runs} RUNNING" in queued(on_cluster), lambda: queued(on_cluster))
    on_cluster.stop_accounting()
    try:
        assert describe_run(tmp_path / "runs").state == "running"
        typed("jobs", "stop", tmp_path / "waits")
        assert f"is job {runs} already" in typed("jobs", "resume", tmp_path / "runs", "--dry_run", code=2).err
        typed("jobs", "stop", tmp_path / "runs", "--now")
        until(lambda: queued(on_cluster) == "", lambda: queued(on_cluster))
    finally:
        on_cluster.start_accounting()


def test_a_job_that_only_the_accounting_knows_is_still_the_submitted_one(
    on_cluster: SlurmCluster, tmp_path: Path
) -> None:
    job = sbatch(on_cluster, "exit 3", "--job-name=graftvit-run")
    submitted(tmp_path, job_id=job, name="graftvit-run")
    known = ["squeue", "--states=all", "--noheader", "--format=%i"]
    until(lambda: job not in on_cluster.run(*known), "the end of what the queue knows", every=0.5)

    def told() -> tuple[str, str]:
        status = describe_run(tmp_path)
        return status.state, status.why

    until(lambda: told() == ("failed", "exit code 3"), told, every=0.5)  # some seconds late
