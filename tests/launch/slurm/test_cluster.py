"""The cluster that other tests run on leaves nothing behind, and a plain srun on it is one run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs.launched import TRAIN, clean, recipe, run_all
from support.runs.patience import until
from support.slurm.cluster_runs import field
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_processes import end, marked

pytestmark = pytest.mark.slurm
StartCluster = Callable[..., SlurmCluster]


def test_stopping_ends_what_does_not_want_to_end(start_cluster: StartCluster) -> None:
    cluster = start_cluster(nodes=1)
    stubborn = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid(); time.sleep(1000)"
    code = f"{sys.executable} -c '{stubborn}' &"
    job = cluster.sbatch(f'srun sh -c "{code} wait"')
    until(lambda: field(cluster, job, "JobState") == "RUNNING", "the job")
    mark = {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
    until(lambda: any("SIG_IGN" in str(process) for process in marked(mark)), "the stubborn process")
    cluster.stop()
    assert marked(mark) == set()
    cluster.stop()


def test_only_the_marked_and_their_descendants_are_ended(tmp_path: Path) -> None:
    mark = {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    forgetful = "env -i sh -c 'sleep 1000; :'; :"
    with (
        subprocess.Popen(["sh", "-c", forgetful], env=mark) as ours,
        subprocess.Popen(["sleep", "1000"], env={"SLURM_CONF": f"{tmp_path}/slurm.conf.old"}) as other,
    ):
        until(lambda: len(marked(mark)) == 3, lambda: marked(mark), every=0.02)
        end(mark)
        assert ours.wait(timeout=60) == -9
        assert marked(mark) == set()
        assert other.poll() is None
        other.kill()


def test_where_slurm_is_missing_the_reason_is_given(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.slurm.slurm_cluster.PROGRAMS", ("no_such_daemon",))
    monkeypatch.delenv("GRAFTVIT_TEST_SLURM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_daemon: not installed"):
        start_cluster()
    monkeypatch.setenv("GRAFTVIT_TEST_SLURM", "1")
    with pytest.raises(pytest.fail.Exception, match="no_such_daemon: not installed"):
        start_cluster()


@pytest.mark.slow
def test_plain_srun(tmp_path: Path, cluster: SlurmCluster) -> None:
    path = recipe(tmp_path)
    command = ["srun", "-N", "2", "-n", "2", sys.executable, *TRAIN, str(path)]
    run_all([command], [clean(**cluster.environment)], tmp_path)
