"""What commands do on a cluster with a database of all jobs: while it is away, and after the queue has forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.launch.cli import main
from graftvit.launch.slurm import scheduler as ask
from graftvit.launch.slurm.jobs import describe_run
from support.runs.patience import until
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_config import ClusterOptions
from support.slurm.slurm_folders import submitted

pytestmark = pytest.mark.slurm
CLUSTER = ClusterOptions(accounting=True, min_job_age=2)


@pytest.fixture
def user(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """The cluster, as this process sees it."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setattr(ask, "_silent", {})
    return cluster


def sbatch(cluster: SlurmCluster, command: str, *flags: str) -> str:
    return cluster.run("sbatch", "--parsable", "--output=/dev/null", *flags, "--wrap", command).strip()


def queued(cluster: SlurmCluster) -> str:
    return cluster.run("squeue", "--noheader", "--format=%i %T")


def test_jobs_are_stopped_and_resumed_while_the_accounting_is_away(
    user: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waits, runs = sbatch(user, "sleep 900", "--hold"), sbatch(user, "sleep 900")
    for name, job in (("waits", waits), ("runs", runs)):
        submitted(tmp_path / name, job_id=job)
    until(lambda: f"{runs} RUNNING" in queued(user), lambda: queued(user))
    user.stop_accounting()
    try:
        assert describe_run(tmp_path / "runs").state == "running"
        assert main(["stop", str(tmp_path / "waits")]) == 0
        assert main(["resume", str(tmp_path / "runs"), "--dry_run"]) == 2
        assert f"is job {runs} already" in capsys.readouterr().err
        assert main(["stop", str(tmp_path / "runs"), "--now"]) == 0
        until(lambda: queued(user) == "", lambda: queued(user))
    finally:
        user.start_accounting()


def test_a_job_that_only_the_accounting_knows_is_still_the_submitted_one(
    user: SlurmCluster, tmp_path: Path
) -> None:
    job = sbatch(user, "exit 3", "--job-name=graftvit-run")
    submitted(tmp_path, job_id=job, name="graftvit-run")
    known = ["squeue", "--states=all", "--noheader", "--format=%i"]
    until(lambda: job not in user.run(*known), "the end of what the queue knows", every=0.5)

    def told() -> tuple[str, str]:
        status = describe_run(tmp_path)
        return status.state, status.why

    until(lambda: told() == ("failed", "exit code 3"), told, every=0.5)  # some seconds late
