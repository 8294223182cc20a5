"""What is asked of a real Slurm reaches it as meant, waits, or is refused before anything is queued or written."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from support.runs.patience import until
from support.runs.typed import Typed
from support.slurm.cluster_users import user_with_recipe
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_config import ClusterOptions

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
Submit = Callable[..., tuple[str, str]]
CLUSTER = ClusterOptions(gpu_types=("a100", "a100", "h100"), gres="tmpdisk:100")
"""Two nodes with A100s and one with H100s, each with a local disk."""
CHECKING = "graftvit: checking the run: its settings, teacher, data and plan ...\n"


@pytest.fixture
def user(tmp_path: Path, cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user of that cluster with a recipe `run.yaml`, and a site file that says what is shared."""
    return user_with_recipe(tmp_path, monkeypatch, cluster.environment)


@pytest.fixture
def submitted(user: Path, cluster: SlurmCluster, typed: Typed) -> Submit:
    """Submits; what the command says, and what Slurm knows of the job, which is cancelled then."""

    def submit(line: str, hold: bool = True) -> tuple[str, str]:
        said = typed("submit run.yaml", *shlex.split(line), *(["--sbatch", "hold=true"] if hold else [])).out
        job = said.split()[2]
        shown = cluster.run("scontrol", "--oneliner", "show", "job", job)
        cluster.run("scancel", job)
        return said, shown

    return submit


@pytest.fixture
def refused(user: Path, cluster: SlurmCluster, typed: Typed) -> Callable[..., str]:
    """Runs `graftvit submit`, which must refuse in one sentence, queue nothing and leave no file."""

    def submit(line: str) -> str:
        before = sorted(user.rglob("*"))
        said = typed("submit run.yaml", *shlex.split(line), code=2)
        assert said.out == ""
        told = said.err.removeprefix(CHECKING)
        assert told.count("\n") == 1, said.err
        assert told.startswith("graftvit: error: ")
        # a job that was cancelled before may still be ending
        until(lambda: not cluster.run("squeue", "-h"), lambda: cluster.run("squeue"))
        assert sorted(user.rglob("*")) == before
        return told

    return submit


@pytest.mark.parametrize(
    ("line", "known"),
    [
        ("--gpus_per_node a100:2", ["NumTasks=2", "TresPerNode=gres:gpu:a100:2", "Reason=JobHeldUser"]),
        ("--gpus_per_node 2 --gpu_bind single:1", ["NumTasks=2", "TresBind=gpu:single:1"]),
        ("--gres gpu:h100:3,tmpdisk:50", ["NumTasks=3", "TresPerNode=gres:gpu:h100:3,gres:tmpdisk:50"]),
        ("--gres tmpdisk:50 --nodes 3", ["NumTasks=3", "gres:tmpdisk:50", "gres:gpu:1"]),
        ("--mem_per_cpu 200", ["MinMemoryCPU=200M"]),
        ("--mem_per_gpu 300 --gpus_per_node 2", ["MemPerTres=gres:gpu:300", "NumTasks=2"]),
        ("--partition main,high", [" Partition=main,high "]),
        ("--nodelist 127.0.0.12", [" ReqNodeList=127.0.0.12 "]),
        ("--mail FAIL,me@example.org", ["MailUser=me@example.org", "MailType=FAIL"]),
    ],
)
def test_what_slurm_understands(line: str, known: list[str], submitted: Submit) -> None:
    _, shown = submitted(line)
    assert [text for text in known if text not in shown] == [], shown


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--gres tmpdisc:5", "--gres is tmpdisc:5: sbatch refuses the job: Invalid generic resource"),
        ("--mem 1.5G", "--mem is 1.5G: sbatch refuses the job: Invalid --mem specification"),
        ("--mem '240 GB'", "--mem is 240 GB: sbatch refuses the job: Invalid --mem specification"),
        ("--mem_per_gpu 1.5G", "--mem_per_gpu is 1.5G: sbatch refuses the job: "),
        ("--mail never", "sbatch refuses the job: "),
        ("--sbatch nosuch=1", "sbatch refuses the job: "),
        ("--data.dataset folder --data_path nowhere", "nowhere"),
        ("--data.train_samples 1 --nodes 2 --gpus_per_node 0", "has 1 images, fewer than 2 ranks"),
        ("--constraint a100", "--constraint is a100: sbatch refuses the job: Invalid feature specification"),
        ("--reservation weekend", "--reservation is weekend: sbatch refuses the job: Requested reservation"),
        ("--dependency afterwards:3", "--dependency is afterwards:3: sbatch refuses the job"),
    ],
)
def test_what_never_runs_is_refused(line: str, said: str, refused: Callable[..., str]) -> None:
    assert said in refused(line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--gpus_per_node h100:1 --nodes 2", "is not available (--nodes is 2, --gpus_per_node is h100:1"),
        ("--mem 9G", "--mem is 9G: sbatch refuses the job: Memory specification can not be satisfied"),
        ("--mem_per_cpu 9G --cpus_per_task 1", "--mem_per_cpu is 9G: sbatch refuses the job: Memory"),
        ("--cpus_per_task 3 --tasks_per_node 3", "--cpus_per_task is 3: sbatch refuses the job: CPU count"),
    ],
)
def test_what_sbatch_alone_can_refuse_leaves_no_job(
    line: str, said: str, user: Path, cluster: SlurmCluster, typed: Typed
) -> None:
    """`--test-only` says the same of nodes that are drained."""
    assert said in typed("submit run.yaml", *shlex.split(line), code=2).err
    assert cluster.run("squeue", "-h") == ""
    assert "was never submitted" in typed("jobs run", code=2).err


def test_a_dry_run_prints_the_script_of_what_is_refused(user: Path, typed: Typed) -> None:
    said = typed("submit run.yaml --partition hihg --dry_run", code=2)
    assert "#SBATCH --partition=hihg\n" in said.out
    assert "images" not in said.out  # the plan, which takes long
    assert "--partition is hihg: sbatch refuses the job: Invalid partition name specified" in said.err


def test_limits_of_a_partition(submitted: Submit, cluster: SlurmCluster) -> None:
    """One partition of several that fits will do."""
    cluster.run("scontrol", "update", "partitionname=high", "maxtime=1-0", "maxnodes=1")
    try:
        said, _ = submitted("--partition high --time 24:00:01", hold=False)
        assert "see --time: PartitionTimeLimit" in said
        said, _ = submitted("--partition high --nodes 2 --time 60", hold=False)
        assert "see --nodes: PartitionNodeLimit" in said
        said, _ = submitted("--partition high,main --time 25:00:00 --nodes 2", hold=False)
        assert "PartitionNodeLimit" not in said
    finally:
        cluster.run("scontrol", "update", "partitionname=high", "maxtime=infinite", "maxnodes=unlimited")


def test_a_folder_with_unusual_letters(user: Path, cluster: SlurmCluster, typed: Typed) -> None:
    folder = user / 'my run\'s "best"'
    words = ["--output_dir", folder, "--comment", "it's 5 o'clock", "--sbatch", "hold"]
    printed = typed("submit run.yaml", *words, "--dry_run").out
    job = typed("submit run.yaml", *words).out.split()[2]
    shown = cluster.run("scontrol", "show", "job", job)
    cluster.run("scancel", job)
    assert f"StdOut={folder}/jobs/logs/{job}_0_log.out" in shown
    assert "Comment=it's 5 o'clock" in shown
    (script,) = (folder / "jobs").glob("launch-*/submit.sh")
    shown_as = re.search(r"launch-[0-9a-f]{8}", printed)
    assert shown_as is not None
    sent = script.read_text().replace(script.parent.name, shown_as[0])
    assert printed.endswith(sent + "\n")  # a dry run shows what is sent, to the letter


def test_a_reservation(submitted: Submit, cluster: SlurmCluster) -> None:
    asked = ["reservationname=mine", "starttime=now", "duration=60", "user=root", "nodes=127.0.0.13"]
    cluster.run("scontrol", "create", "reservation", *asked)
    try:
        _, shown = submitted("--reservation mine")
        assert " Reservation=mine " in shown
        said, shown = submitted("--nodes 3", hold=False)  # of which one is reserved
        assert "it waits for nodes" in said
        assert "JobState=PENDING" in shown
    finally:
        cluster.run("scontrol", "delete", "reservationname=mine")


def test_a_job_whose_nodes_are_drained_is_submitted_and_waits(
    user: Path, cluster: SlurmCluster, typed: Typed
) -> None:
    cluster.drain(*cluster.nodes)
    waits = "it waits for nodes that are down, drained or reserved: "
    try:
        assert "also said of nodes that are down" in typed("submit run.yaml --dry_run").out
        said = typed("submit run.yaml").out
        assert waits in said
        cluster.run("scancel", said.split()[2])
        said = typed("jobs resume run --nodes 2 --gpus_per_node a100:1").out
        assert waits in said
        typed("jobs resume run --nodes 2 --dry_run", code=2)  # it has a job already
        cluster.run("scancel", said.split()[2])
    finally:
        cluster.undrain(*cluster.nodes)


def test_a_partition_that_is_closed_is_told_apart_from_one_that_is_down(
    user: Path, cluster: SlurmCluster, typed: Typed, submitted: Submit
) -> None:
    try:
        cluster.run("scontrol", "update", "partitionname=main", "state=drain")
        said = typed("submit run.yaml", code=2).err
        assert "sbatch refuses the job: Required partition not available (inactive or drain)" in said
        cluster.run("scontrol", "update", "partitionname=main", "state=down")
        said, _ = submitted("", hold=False)
        assert "it waits: PartitionDown" in said
    finally:
        cluster.run("scontrol", "update", "partitionname=main", "state=up")


def test_the_surroundings_of_sbatch(
    user: Path, monkeypatch: pytest.MonkeyPatch, submitted: Submit, typed: Typed
) -> None:
    for name, value in {
        "PARTITION": "high", "TIMELIMIT": "30", "NO_REQUEUE": "1", "SIGNAL": "TERM@10", "OPEN_MODE": "truncate",
        "ARRAY_INX": "0-3", "OUTPUT": "/dev/null", "GPUS_PER_NODE": "h100:2", "WCKEY": "mine",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SBATCH_{name}", value)
    printed = typed("submit run.yaml --dry_run").out
    assert "  partition          high                   SBATCH_PARTITION\n" in printed
    assert "SBATCH_ARRAY_INX, SBATCH_NO_REQUEUE, SBATCH_OPEN_MODE, SBATCH_OUTPUT, SBATCH_SIGNAL\n" in printed
    _, shown = submitted("--time 60")
    wanted = ("Partition=high", "TimeLimit=01:00:00", "Requeue=1", "NumTasks=2", "gpu:h100:2", "/jobs/logs/")
    assert [text for text in wanted if text not in shown] == []
    assert "ArrayJobId" not in shown


def write_images(root: Path, count: int) -> Path:
    """An ImageNet of two classes, all of the same picture."""
    root.mkdir()
    Image.new("RGB", (32, 32)).save(root / "one.jpg")
    for part in ("train", "val"):
        for kind in ("n01", "n02"):
            (root / part / kind).mkdir(parents=True)
            for number in range(count // 2):
                (root / part / kind / f"{number}.jpg").hardlink_to(root / "one.jpg")
    return root


WANTED = [
    "--nodes=8", "--gpus-per-node=8", "--ntasks-per-node=8", "--cpus-per-task=11", "--time=4320", "--partition=main",
    "--signal=USR2@90", "--requeue", "--open-mode=append", "--mem=200G", "--account=lab",
]  # fmt: skip


def test_the_script_of_the_published_recipe_is_accepted(
    tmp_path: Path, start_cluster: Callable[..., SlurmCluster], monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    big = start_cluster(nodes=8, gpus=8, cpus=96, memory=250_000)
    user_with_recipe(tmp_path, monkeypatch, big.environment)
    images = write_images(tmp_path / "imagenet", 2048)
    before = sorted(tmp_path.rglob("*"))
    asked = "--nodes 8 --gpus_per_node 8 --cpus_per_task 11 --time 3-00:00:00 --partition main --mem 200G"
    asked += " --account lab --setup 'module load cuda' --num_classes none"  # of the images there are two
    words = f"--output_dir {tmp_path}/distill --data_path {images} --dry_run"
    printed = typed(f"submit attention_distill_vit_large {asked} {words}").out
    assert sorted(tmp_path.rglob("*")) == before
    plan, mark, script = printed.partition("#!/bin/bash")
    assert "2048" in plan  # 8 x 8 x 32, the published batch
    assert [option for option in WANTED if f"#SBATCH {option}\n" not in script] == [], script
    assert "module load cuda\n" in script
    done = subprocess.run(["sbatch", "--test-only"], input=mark + script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "using 704 processors on nodes" in done.stderr
    assert big.run("squeue", "-h") == ""
