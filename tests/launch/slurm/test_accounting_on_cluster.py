"""What commands do on a cluster with a database of all jobs: while it is away, and after the queue has forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.launch.slurm.jobs import describe_runs
from support.runs.patience import until
from support.runs.typed import Typed
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_config import ClusterOptions
from support.slurm.slurm_folders import submitted

pytestmark = pytest.mark.slurm
CLUSTER = ClusterOptions(accounting=True, min_job_age=2)


def queued(cluster: SlurmCluster) -> str:
    return cluster.run("squeue", "--noheader", "--format=%i %T")


def test_a_job_that_only_the_accounting_knows_is_still_the_submitted_one(
    on_cluster: SlurmCluster, tmp_path: Path
) -> None:
    job = on_cluster.sbatch("exit 3", "--job-name=graftvit-run")
    submitted(tmp_path, job_id=job, name="graftvit-run")
    known = ["squeue", "--states=all", "--noheader", "--format=%i"]
    until(lambda: job not in on_cluster.run(*known), "the end of what the queue knows", every=0.5)

    def told() -> tuple[str, str]:
        status = describe_runs([tmp_path])[0]
        return status.state, status.why

    until(lambda: told() == ("failed", "exit code 3"), told, every=0.5)  # some seconds late


def test_what_a_run_has_cost(on_cluster: SlurmCluster, tmp_path: Path, typed: Typed) -> None:
    """Each start counts, and what the queue has forgotten."""
    job = on_cluster.sbatch("sleep 900", "--cpus-per-task=2")
    files = submitted(tmp_path, job_id=job)
    until(lambda: f"{job} RUNNING" in queued(on_cluster), lambda: queued(on_cluster))
    on_cluster.run("scontrol", "requeue", job)
    until(lambda: f"{job} RUNNING" in queued(on_cluster), lambda: queued(on_cluster), every=1.0)
    name = files.begin(job_id=job, restart=1, nodes=["n1"], world_size=1)
    files.note(name, lost=7)
    on_cluster.run("scancel", job)

    def row() -> list[str]:
        return typed("jobs", tmp_path, "--cost").out.splitlines()[-1].split()

    until(lambda: row()[1] == "2", row, every=1.0)
    assert row()[0] == str(tmp_path)
    assert row()[-1] == "7"
    assert float(row()[3]) == pytest.approx(2 * float(row()[4]), abs=0.02)  # two cores
