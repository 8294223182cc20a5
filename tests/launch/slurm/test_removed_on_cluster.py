"""Run folders that somebody removes or moves while their jobs wait or run, on a real cluster."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs.patience import until
from support.slurm.cluster_runs import ClusterRun, cluster_run, held
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ALONE = ("--nodes", "1", "--tasks_per_node", "1", "--unchecked")


@pytest.fixture
def run(cluster: SlurmCluster, tmp_path: Path) -> Iterator[ClusterRun]:
    """One that takes long; its jobs end with the test."""
    yield cluster_run(cluster, tmp_path, optim={"epochs": 200}, data={"batch_size": 16})
    cluster.run("scancel", "--me")
    wait_for_the_end(cluster)


def wait_for_the_end(cluster: SlurmCluster) -> None:
    def queue() -> str:
        return cluster.run("squeue", "--noheader", "--format=%i %j %T %R")

    until(lambda: "graftvit-" not in queue(), lambda: f"the end of all jobs: {queue()}", every=0.2)


def remove(folder: Path) -> None:
    """As `rm -rf` does, told again where the run has written something in between."""

    def gone() -> bool:
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()

    until(gone, f"{folder} to be gone")


def test_the_job_of_a_folder_that_was_removed_is_known_and_stopped(run: ClusterRun) -> None:
    with held(run.cluster) as waiting:
        job = run.submit(*ALONE, *waiting)
        remove(run.folder)
        (status,) = json.loads(run.graftvit("jobs", "--json"))
        assert (status["folder"], status["job_id"], status["state"]) == (str(run.folder), job, "pending")
        assert "its folder was removed or moved" in run.graftvit("jobs", str(run.folder))
        recipe = str(run.root / f"{run.folder.name}.yaml")
        assert f"is job {job} already" in run.graftvit("submit", recipe, *ALONE, code=2)
        assert f"job {job} of {run.folder} was pending and is cancelled" in run.graftvit(
            "stop", str(run.folder)
        )
        assert not run.folder.exists()
    wait_for_the_end(run.cluster)


@pytest.mark.parametrize("told", [False, True])
def test_a_run_whose_folder_is_removed_ends_and_makes_no_other(run: ClusterRun, told: bool) -> None:
    job = run.submit(*ALONE)
    run.wait_for_lines(3)
    remove(run.folder)
    if told:
        assert f"job {job} of {run.folder} was running and is cancelled" in run.graftvit(
            "stop", str(run.folder)
        )
    wait_for_the_end(run.cluster)
    assert not run.folder.exists()


def test_a_run_whose_folder_is_moved_says_so(run: ClusterRun) -> None:
    run.submit(*ALONE)
    run.wait_for_lines(3)
    moved = run.folder.rename(run.root / "moved")
    wait_for_the_end(run.cluster)
    assert not run.folder.exists()
    log = next((moved / "jobs" / "logs").glob("*_0_log.err")).read_text()
    assert f"{run.folder} is not there any more: it was moved or removed" in log
    assert "taken over" not in log
    assert "it was moved or removed" in run.graftvit("jobs", str(moved))


def test_a_mistyped_folder_is_told_the_nearest(run: ClusterRun) -> None:
    run.folder.mkdir()
    path = run.folder.with_name("rum")
    assert run.graftvit("stop", str(path), code=2) == (
        f"graftvit: error: {path} is no folder: did you mean {str(run.folder)!r}?\n"
    )
