"""The cluster that other tests run on does what a real one does, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs.patience import until
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_processes import ClusterError, end, marked

pytestmark = pytest.mark.slurm
StartCluster = Callable[..., SlurmCluster]


def show(cluster: SlurmCluster, job: str) -> dict[str, str]:
    """The controller's record of a job."""
    words = cluster.run("scontrol", "--oneliner", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait_for(cluster: SlurmCluster, job: str, field: str, value: str) -> dict[str, str]:
    until(lambda: show(cluster, job)[field] == value, lambda: f"{field}={value}: {show(cluster, job)}")
    return show(cluster, job)


def test_tasks_of_two_nodes_see_their_place_and_their_gpus(cluster: SlurmCluster) -> None:
    command = "echo $SLURM_PROCID $SLURMD_NODENAME $SLURM_LOCALID $CUDA_VISIBLE_DEVICES"
    flags = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"]
    lines = sorted(cluster.run("srun", *flags, "sh", "-c", command).splitlines())
    first, second = cluster.nodes[:2]
    assert lines == [f"0 {first} 0 0,1", f"1 {first} 1 0,1", f"2 {second} 0 0,1", f"3 {second} 1 0,1"]


def test_two_at_once_are_strangers(cluster: SlurmCluster, start_cluster: StartCluster) -> None:
    other = start_cluster(nodes=1, gpus=0, accounting=True, min_job_age=2)
    job = other.sbatch("exit 3")
    wait_for(other, job, "JobState", "FAILED")
    assert job not in cluster.run("squeue", "--states=all", "--noheader", "--format=%i").split()
    asked = ["sacct", "-X", "-n", "--parsable2", "-o", "JobID,JobName,State,ExitCode,NodeList", "-j", job]
    row = f"{job}|wrap|FAILED|3:0|{other.nodes[0]}"
    until(lambda: other.run(*asked).split() == [row], lambda: other.run(*asked), every=0.5)
    known = ["squeue", "--states=all", "--noheader", "--format=%i"]
    until(lambda: other.run(*known) == "", "the end of what the controller knows", every=0.5)
    assert other.run(*asked).split() == [row]
    with pytest.raises(ClusterError, match="accounting storage is disabled"):
        cluster.run("sacct", "-j", "1")


def test_stopping_ends_what_does_not_want_to_end(start_cluster: StartCluster) -> None:
    cluster = start_cluster(nodes=1)
    stubborn = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid(); time.sleep(1000)"
    code = f"{sys.executable} -c '{stubborn}' &"
    job = cluster.sbatch(f'srun sh -c "{code} wait"')
    wait_for(cluster, job, "JobState", "RUNNING")
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
