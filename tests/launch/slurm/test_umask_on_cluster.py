"""What a job writes follows the umask of whoever submitted it: a colleague of the group can load the student."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs.patience import until
from support.slurm.cluster_runs import cluster_run
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ALONE = ("--nodes", "1", "--tasks_per_node", "1")


@pytest.fixture(params=[0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_all_that_a_job_writes(cluster: SlurmCluster, tmp_path: Path, umask: int) -> None:
    run = cluster_run(cluster, tmp_path, optim={"epochs": 1}, data={"batch_size": 16})
    job = run.submit(*ALONE)
    run.finish()
    until(
        lambda: "COMPLETED" in cluster.run("squeue", "-h", "--states=all", "-j", job, "-o", "%T"),
        "the end of the job",
    )
    wrong = {}
    for path in [run.folder, *run.folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        if mode & 0o666 != wanted & 0o666 or (path.is_dir() and mode & 0o777 != wanted):
            wrong[str(path.relative_to(run.folder))] = oct(mode)
    assert not wrong
