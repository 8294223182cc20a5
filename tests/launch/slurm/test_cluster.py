"""The cluster that other tests run on does what a real one does, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs.patience import until
from support.slurm.slurm_cluster import LONGEST_FOLDER, SlurmCluster, missing_programs
from support.slurm.slurm_config import ClusterOptions
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


def sbatch(cluster: SlurmCluster, command: str, *flags: str) -> str:
    words = ["sbatch", "--parsable", "--output=/dev/null", *flags, "--wrap", command]
    return cluster.run(*words).strip()


def test_tasks_of_two_nodes_see_their_place_and_their_gpus(cluster: SlurmCluster) -> None:
    command = "echo $SLURM_PROCID $SLURMD_NODENAME $SLURM_LOCALID $CUDA_VISIBLE_DEVICES"
    flags = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"]
    lines = sorted(cluster.run("srun", *flags, "sh", "-c", command).splitlines())
    first, second = cluster.nodes[:2]
    assert lines == [f"0 {first} 0 0,1", f"1 {first} 1 0,1", f"2 {second} 0 0,1", f"3 {second} 1 0,1"]


def test_more_gpus_than_a_node_has_are_refused(cluster: SlurmCluster) -> None:
    with pytest.raises(ClusterError, match="node configuration is not available"):
        sbatch(cluster, "true", "--gpus-per-node=5")


def test_a_job_whose_node_dies_is_queued_again(cluster: SlurmCluster) -> None:
    job = sbatch(cluster, "srun sleep 1000", "--nodes=2")
    wait_for(cluster, job, "JobState", "RUNNING")
    cluster.kill_node(cluster.nodes[0])
    assert wait_for(cluster, job, "Restarts", "1")["JobState"] in ("COMPLETING", "PENDING")
    assert (
        marked({"SLURM_CONF": cluster.environment["SLURM_CONF"], "SLURMD_NODENAME": cluster.nodes[0]})
        == set()
    )
    cluster.start_node(cluster.nodes[0])
    cluster.run("scancel", job)
    everywhere = cluster.run("srun", "--nodes=3", "sh", "-c", "echo $SLURMD_NODENAME")
    assert sorted(everywhere.split()) == cluster.nodes


def test_two_at_once_are_strangers(cluster: SlurmCluster, start_cluster: StartCluster) -> None:
    other = start_cluster(nodes=1, gpus=0, accounting=True, min_job_age=2)
    job = sbatch(other, "exit 3")
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


def test_accounting_goes_away_and_comes_back(start_cluster: StartCluster) -> None:
    cluster = start_cluster(nodes=1, accounting=True, mode="ns")
    cluster.stop_accounting()
    with pytest.raises(ClusterError, match="Problem talking to the database: Connection refused"):
        cluster.run("sacct")
    job = sbatch(cluster, "exit 3")
    wait_for(cluster, job, "JobState", "FAILED")
    cluster.start_accounting()
    asked = ["sacct", "-X", "-n", "-o", "State", "-j", job]
    until(lambda: cluster.run(*asked).split() == ["FAILED"], lambda: cluster.run(*asked), every=0.5)


def test_where_the_accounting_is_missing_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.slurm.slurm_cluster.OF_ACCOUNTING", ("no_such_database",))
    assert "no_such_database: not installed" in missing_programs(ClusterOptions(accounting=True))
    assert "no_such_database" not in missing_programs()


def test_stopping_ends_what_does_not_want_to_end(start_cluster: StartCluster) -> None:
    cluster = start_cluster(nodes=1)
    stubborn = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid(); time.sleep(1000)"
    code = f"{sys.executable} -c '{stubborn}' &"
    job = sbatch(cluster, f'srun sh -c "{code} wait"')
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
        assert ours.wait(timeout=5) == -9
        assert marked(mark) == set()
        assert other.poll() is None
        other.kill()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="too long for Slurm's sockets"):
        SlurmCluster(tmp_path / ("x" * LONGEST_FOLDER))


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


def test_a_daemon_that_does_not_come_up_leaves_nothing(
    cluster_folders: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := missing_programs():
        pytest.skip(reason)
    cluster = SlurmCluster(cluster_folders())
    monkeypatch.setattr("support.slurm.slurm_config._PLUGINS", ["SelectType=select/unheard_of"])
    with pytest.raises(ClusterError, match=r"slurmctld does not come up: .*unheard_of"):
        cluster.start()
    assert marked({"SLURM_CONF": cluster.environment["SLURM_CONF"]}) == set()


def test_a_node_in_a_network_of_its_own_can_be_cut_off(start_cluster: StartCluster) -> None:
    cluster = start_cluster(nodes=2, mode="ns")
    # has the same addresses, in a network of its own
    assert start_cluster(nodes=1, mode="ns").run("srun", "hostname").split() == ["n1"]
    assert sorted(cluster.run("srun", "--nodes=2", "hostname").split()) == ["n1", "n2"]
    job = sbatch(cluster, "exec sleep 1000", "--nodelist=n2")

    def sleeps() -> bool:
        return any(str(process).endswith("(sleep 1000)") for process in marked({"SLURM_JOB_ID": job}))

    until(sleeps, "the job's script")  # a job is RUNNING before its node has heard of it
    cluster.cut_node("n2")
    with pytest.raises((ClusterError, subprocess.TimeoutExpired)):
        cluster.run("srun", "--jobid", job, "--overlap", "true", timeout=2)
    assert sleeps()
    cluster.mend_node("n2")
    assert cluster.run("srun", "--jobid", job, "--overlap", "hostname").split() == ["n2"]


def test_a_restart_of_the_controller_and_drained_nodes(start_cluster: StartCluster) -> None:
    cluster = start_cluster()
    job = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 600").strip()
    until(lambda: "RUNNING" in cluster.run("squeue", "-h", "-o", "%T"), "the start of the job")
    cluster.stop_controller()
    with pytest.raises(ClusterError, match="Unable to contact"):
        cluster.run("squeue")
    cluster.start_controller()
    assert cluster.run("squeue", "-h", "-o", "%i %T").split() == [job, "RUNNING"]
    cluster.drain(*cluster.nodes)
    assert set(cluster.run("sinfo", "-h", "-N", "-o", "%T").split()) <= {"drain", "draining", "drained"}
    cluster.undrain(*cluster.nodes)
    assert not {"drain", "draining", "drained"} & set(cluster.run("sinfo", "-h", "-N", "-o", "%T").split())
