"""What is asked for reaches a real Slurm as it was meant, and waits for its nodes where Slurm lets it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from graftvit.launch.cli import main
from support.runs.patience import until
from support.slurm.cluster_users import user_with_recipe
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_config import ClusterOptions

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
Captured = pytest.CaptureFixture[str]
CLUSTER = ClusterOptions(gpu_types=("a100", "a100", "h100"), gres="tmpdisk:100")
"""Two nodes with A100s and one with H100s, each with a local disk."""


@pytest.fixture
def user(tmp_path: Path, cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user of that cluster with a recipe `run.yaml`, and a site file that says what is shared."""
    return user_with_recipe(tmp_path, monkeypatch, cluster.environment)


@pytest.fixture
def submitted(user: Path, cluster: SlurmCluster, capsys: Captured) -> Callable[..., tuple[str, str]]:
    """Submits; what the command says, and what Slurm knows of the job, which is cancelled then."""

    def submit(*words: str, hold: bool = True) -> tuple[str, str]:
        assert main(["submit", "run.yaml", *words, *(["--sbatch", "hold=true"] if hold else [])]) == 0
        said = capsys.readouterr().out
        job = said.split()[2]
        shown = cluster.run("scontrol", "--oneliner", "show", "job", job)
        cluster.run("scancel", job)
        return said, shown

    return submit


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (["--gpus_per_node", "a100:2"], ["NumTasks=2", "TresPerNode=gres:gpu:a100:2", "Reason=JobHeldUser"]),
        (["--gpus_per_node", "2", "--gpu_bind", "single:1"], ["NumTasks=2", "TresBind=gpu:single:1"]),
        (
            ["--gres", "gpu:h100:3,tmpdisk:50"],
            ["NumTasks=3", "TresPerNode=gres:gpu:h100:3,gres:tmpdisk:50"],
        ),
        (["--gres", "tmpdisk:50", "--nodes", "3"], ["NumTasks=3", "gres:tmpdisk:50", "gres:gpu:1"]),
        (["--mem_per_cpu", "200"], ["MinMemoryCPU=200M"]),
        (["--mem_per_gpu", "300", "--gpus_per_node", "2"], ["MemPerTres=gres:gpu:300", "NumTasks=2"]),
        (["--partition", "main,high"], [" Partition=main,high "]),
        (["--nodelist", "127.0.0.12"], [" ReqNodeList=127.0.0.12 "]),
        (["--mail", "FAIL,me@example.org"], ["MailUser=me@example.org", "MailType=FAIL"]),
        (["--mail", "me@example.org"], ["MailType=END,FAIL"]),
    ],
)
def test_what_slurm_understands(
    words: list[str], known: list[str], submitted: Callable[..., tuple[str, str]]
) -> None:
    _, shown = submitted(*words)
    assert [text for text in known if text not in shown] == [], shown


def test_a_reservation(submitted: Callable[..., tuple[str, str]], cluster: SlurmCluster) -> None:
    asked = ["reservationname=mine", "starttime=now", "duration=60", "user=root", "nodes=127.0.0.13"]
    cluster.run("scontrol", "create", "reservation", *asked)
    try:
        _, shown = submitted("--reservation", "mine")
        assert " Reservation=mine " in shown
        said, shown = submitted("--nodes", "3", hold=False)  # of which one is reserved
        assert "1 of 3 nodes of partition main that fit are reserved now: the job waits for them" in said
        assert "JobState=PENDING" in shown
    finally:
        cluster.run("scontrol", "delete", "reservationname=mine")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus_per_node", "a100:5"], "--gpus_per_node is a100:5: partition main has nodes with up to 4 GPUs of"),
        (["--gpus_per_node", "h100:1", "--nodes", "2"], "and 1 of its 3 nodes have so many; 2 are asked for"),
        (["--gres", "gpu:v100:1"], "--gres is gpu:v100:1: partition main has nodes with up to 0 GPUs of type v100"),
        (["--gres", "tmpdisk:500"], "--gres is tmpdisk:500: partition main has nodes with up to 100 tmpdisk, and 0 of"),
        (["--partition", "main,high", "--mem", "9G"], "--mem is 9216: partition main has nodes with up to 4000 MiB"),
    ],
)  # fmt: skip
def test_what_never_runs_is_refused(
    words: list[str], said: str, user: Path, cluster: SlurmCluster, capsys: Captured
) -> None:
    assert main(["submit", "run.yaml", *words]) == 2
    assert said in capsys.readouterr().err
    assert cluster.run("squeue", "-h") == ""


def test_one_partition_of_several_that_fits_will_do(
    submitted: Callable[..., tuple[str, str]], cluster: SlurmCluster, user: Path
) -> None:
    cluster.run("scontrol", "update", "partitionname=high", "maxtime=60", "maxnodes=1")
    try:
        _, shown = submitted("--partition", "high,main", "--time", "2:00:00", "--nodes", "2")
        assert " Partition=high,main " in shown
        assert main(["submit", "run.yaml", "--partition", "high", "--time", "2:00:00"]) == 2
    finally:
        cluster.run("scontrol", "update", "partitionname=high", "maxtime=infinite", "maxnodes=unlimited")


def test_a_job_whose_nodes_are_drained_is_submitted_and_waits(
    user: Path, cluster: SlurmCluster, capsys: Captured
) -> None:
    cluster.drain(*cluster.nodes)
    try:
        assert main(["submit", "run.yaml", "--gpus_per_node", "h100:1", "--nodes", "2"]) == 2  # never
        assert "and 1 of its 3 nodes have so many; 2 are asked for" in capsys.readouterr().err
        waits = "all 3 nodes of partition main that fit are drained now: the job waits for them\n"
        assert main(["submit", "run.yaml", "--dry_run"]) == 0
        assert waits in capsys.readouterr().out
        assert main(["submit", "run.yaml"]) == 0
        said = capsys.readouterr().out
        job = said.split()[2]
        assert waits in said
        assert "JobState=PENDING" in cluster.run("scontrol", "show", "job", job)
        cluster.run("scancel", job)
        assert main(["resume", "run", "--nodes", "2", "--gpus_per_node", "a100:1"]) == 0
        said = capsys.readouterr().out
        assert "all 2 nodes of partition main that fit are drained now: the job waits for them\n" in said
        job = said.split()[2]
        assert main(["resume", "run", "--nodes", "2", "--dry_run"]) == 2  # it has a job already
        capsys.readouterr()
        cluster.run("scancel", job)
        cluster.undrain(cluster.nodes[0])
        state = ["sinfo", "-h", "-o", "%T", "-n", cluster.nodes[0]]
        until(lambda: "idle\n" in cluster.run(*state), lambda: cluster.run(*state))
        assert main(["resume", "run", "--nodes", "2", "--dry_run"]) == 0
        said = capsys.readouterr().out
        assert "1 of 2 nodes of partition main that fit are drained now: the job waits for them\n" in said
    finally:
        for name in cluster.nodes:
            if "DRAIN" in cluster.run("scontrol", "show", "node", name):
                cluster.undrain(name)


def test_a_waiting_job_runs_when_its_nodes_come_back(
    user: Path, cluster: SlurmCluster, capsys: Captured
) -> None:
    cluster.kill_node(cluster.nodes[2])
    try:
        assert main(["submit", "run.yaml", "--gpus_per_node", "h100:1"]) == 0
        said = capsys.readouterr().out
        assert "the only node of partition main that fits is down now: the job waits for them\n" in said
        job = said.split()[2]
    finally:
        cluster.start_node(cluster.nodes[2])
    shown = ["scontrol", "--oneliner", "show", "job", job]
    until(lambda: "JobState=RUNNING" in cluster.run(*shown), lambda: cluster.run(*shown))
    cluster.run("scancel", job)


def test_a_partition_that_is_closed_is_told_apart_from_one_that_is_down(
    user: Path, cluster: SlurmCluster, capsys: Captured, submitted: Callable[..., tuple[str, str]]
) -> None:
    try:
        cluster.run("scontrol", "update", "partitionname=main", "state=drain")
        assert main(["submit", "run.yaml"]) == 2
        assert "Required partition not available (inactive or drain)" in capsys.readouterr().err
        cluster.run("scontrol", "update", "partitionname=main", "state=down")
        said, _ = submitted(hold=False)
        assert "partition main is down now: the job waits for it\n" in said
    finally:
        cluster.run("scontrol", "update", "partitionname=main", "state=up")


def test_the_surroundings_of_sbatch(
    user: Path, monkeypatch: pytest.MonkeyPatch, submitted: Callable[..., tuple[str, str]], capsys: Captured
) -> None:
    for name, value in {
        "PARTITION": "high", "TIMELIMIT": "30", "NO_REQUEUE": "1", "SIGNAL": "TERM@10", "OPEN_MODE": "truncate",
        "ARRAY_INX": "0-3", "OUTPUT": "/dev/null", "GPUS_PER_NODE": "h100:2", "WCKEY": "mine",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SBATCH_{name}", value)
    assert main(["submit", "run.yaml", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "  partition          high                   SBATCH_PARTITION\n" in printed
    assert "SBATCH_ARRAY_INX, SBATCH_NO_REQUEUE, SBATCH_OPEN_MODE, SBATCH_OUTPUT, SBATCH_SIGNAL\n" in printed
    _, shown = submitted("--time", "60")
    for text in (
        "Partition=high",
        "TimeLimit=01:00:00",
        "Requeue=1",
        "NumTasks=2",
        "gpu:h100:2",
        "/jobs/logs/",
    ):
        assert text in shown
    assert "ArrayJobId" not in shown
