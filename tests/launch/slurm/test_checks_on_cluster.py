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
from support.slurm.cluster_users import user_with_recipe, write_site
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

    def submit(line: str, recipe: str = "run.yaml", queued: int = 0) -> str:
        before = sorted(user.rglob("*"))
        said = typed("submit", recipe, *shlex.split(line), code=2)
        assert said.out == ""
        told = said.err.removeprefix(CHECKING)
        assert told.count("\n") == 1, said.err
        assert told.startswith("graftvit: error: ")
        assert len(cluster.run("squeue", "-h").splitlines()) == queued
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
        ("--mail me@example.org", ["MailType=END,FAIL"]),
    ],
)
def test_what_slurm_understands(line: str, known: list[str], submitted: Submit) -> None:
    _, shown = submitted(line)
    assert [text for text in known if text not in shown] == [], shown


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--partition hihg", "is hihg: no partition of this cluster is called 'hihg'; did you mean 'high'?"),
        ("--partition main,hihg", "--partition is main,hihg: no partition of this cluster is called 'hihg'"),
        ("--nodes 4", "--nodes is 4: partition main has 3; `--unchecked` submits it all the same\n"),
        ("--nodes 4 --partition main,high", "--nodes is 4: partition main has 3; `--unchecked` submits"),
        ("--gpus_per_node 5", "--gpus_per_node is 5: partition main has nodes with up to 4 GPUs"),
        ("--gpus_per_node a100:5", "is a100:5: partition main has nodes with up to 4 GPUs of"),
        ("--gpus_per_node h100:1 --nodes 2", "and 1 of its 3 nodes have so many; 2 are asked for"),
        (
            "--gres gpu:v100:1",
            "--gres is gpu:v100:1: partition main has nodes with up to 0 GPUs of type v100",
        ),
        ("--gres gpu:5", "--gres is gpu:5: partition main has nodes with up to 4 GPUs"),
        (
            "--gres tmpdisk:500",
            "--gres is tmpdisk:500: partition main has nodes with up to 100 tmpdisk, and 0 of",
        ),
        (
            "--gres tmpdisc:5",
            "--gres is tmpdisc:5: partition main has nodes with up to 0 tmpdisc, and 0 of its",
        ),
        (
            "--mem_per_cpu 5G",
            "--mem_per_cpu x cores a node is 5120: partition main has nodes with up to 4000 MiB",
        ),
        ("--mem_per_gpu 3G --gpus_per_node 2", "--mem_per_gpu x GPUs a node is 6144: partition main"),
        ("--partition main,high --mem 9G", "--mem is 9216: partition main has nodes with up to 4000 MiB"),
        ("--cpus_per_task 3 --tasks_per_node 3", "--cpus_per_task x tasks a node is 9: partition main has"),
        ("--output_dir /var/tmp/graftvit-run", "cluster.yaml: shared_folders: "),
        ("--data.dataset folder --data_path nowhere", "nowhere"),
        ("--data.dataset torch/cifar10 --data_path nowhere --data.num_classes 10", "nowhere"),
        ("--data.train_samples 1 --nodes 2 --gpus_per_node 0", "has 1 images, fewer than 2 ranks"),
        ("--constraint a100", "sbatch refuses the job: Invalid feature specification; `--dry_run` prints"),
        ("--exclude n77", "sbatch refuses the job: Invalid node name specified"),
        ("--reservation weekend", "sbatch refuses the job: Requested reservation is invalid"),
        ("--sbatch nosuch=1", "sbatch refuses the job: unrecognized option '--nosuch=1'"),
        ("--sbatch mail-type=NEVER", "sbatch refuses the job: Invalid --mail-type specification"),
        ("--dependency afterwards:3", "sbatch refuses the job"),
        ("--time 1", "--time is 1: a run needs a minute to start, and is told to save 90 seconds before"),
        ("--node 2", "--nodes"),
    ],
)
def test_what_never_runs_is_refused(line: str, said: str, refused: Callable[..., str]) -> None:
    assert said in refused(line)


@pytest.mark.parametrize("words", ["--partition hihg", "--nodes 4", "--exclude n77", "--time 1"])
def test_a_dry_run_prints_the_script_of_what_is_refused(words: str, user: Path, typed: Typed) -> None:
    said = typed(f"submit run.yaml {words} --dry_run", code=2)
    assert f"#SBATCH {words.replace(' ', '=')}\n" in said.out
    assert "images" not in said.out  # the plan, which takes long
    assert said.err.startswith("graftvit: error: ")


def test_an_unknown_recipe(refused: Callable[..., str]) -> None:
    assert "did you mean 'attention_distill_vit_large'?" in refused("", recipe="attention_distill_vit_larg")


def test_limits_of_a_partition(refused: Callable[..., str], submitted: Submit, cluster: SlurmCluster) -> None:
    """One partition of several that fits will do."""
    cluster.run("scontrol", "update", "partitionname=high", "maxtime=1-0", "maxnodes=1")
    try:
        said = refused("--partition high --time 24:00:01")
        assert "--time is 24:00:01: partition high allows 1-00:00:00 at most" in said
        said = refused("--partition high --nodes 2 --time 60")
        assert "--nodes is 2: partition high gives a job 1 at most" in said
        _, shown = submitted("--partition high,main --time 25:00:00 --nodes 2")
        assert " Partition=high,main " in shown
    finally:
        cluster.run("scontrol", "update", "partitionname=high", "maxtime=infinite", "maxnodes=unlimited")


def test_without_a_default_partition(refused: Callable[..., str], cluster: SlurmCluster) -> None:
    cluster.run("scontrol", "update", "partitionname=main", "default=no")
    try:
        assert "--partition is not given and the cluster has no default one: valid: main, high" in refused("")
    finally:
        cluster.run("scontrol", "update", "partitionname=main", "default=yes")


def test_no_shared_folder_is_named(refused: Callable[..., str]) -> None:
    write_site(gpus_per_node=0)
    said = refused("--output_dir /tmp/graftvit-nobody-shares-this")
    assert "is on this machine alone, and the nodes of the job would not see it" in said
    assert "shared_folders in the site file" in said


def test_a_run_that_is_queued_already(
    refused: Callable[..., str], user: Path, cluster: SlurmCluster, typed: Typed
) -> None:
    job = typed("submit run.yaml --sbatch hold").out.split()[2]
    try:
        said = refused("", queued=1)
        assert f"{user / 'run'} is job {job} already" in said
        assert "graftvit jobs stop" in said
    finally:
        cluster.run("scancel", job)
    typed("submit run.yaml --sbatch hold")  # and it is free again
    cluster.run("scancel", "--me")


def test_a_folder_with_unusual_letters(
    user: Path, cluster: SlurmCluster, typed: Typed, refused: Callable[..., str]
) -> None:
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
    assert "has a %, which Slurm replaces" in refused(f"--output_dir {user / '50%job'}")


def test_a_reservation(submitted: Submit, cluster: SlurmCluster) -> None:
    asked = ["reservationname=mine", "starttime=now", "duration=60", "user=root", "nodes=127.0.0.13"]
    cluster.run("scontrol", "create", "reservation", *asked)
    try:
        _, shown = submitted("--reservation mine")
        assert " Reservation=mine " in shown
        said, shown = submitted("--nodes 3", hold=False)  # of which one is reserved
        assert "1 of 3 nodes of partition main that fit are reserved now: the job waits for them" in said
        assert "JobState=PENDING" in shown
    finally:
        cluster.run("scontrol", "delete", "reservationname=mine")


def test_a_job_whose_nodes_are_drained_is_submitted_and_waits(
    user: Path, cluster: SlurmCluster, typed: Typed
) -> None:
    cluster.drain(*cluster.nodes)
    waits = "nodes of partition main that fit are drained now: the job waits for them\n"
    try:
        never = typed("submit run.yaml --gpus_per_node h100:1 --nodes 2", code=2).err
        assert "and 1 of its 3 nodes have so many; 2 are asked for" in never
        assert f"all 3 {waits}" in typed("submit run.yaml --dry_run").out
        said = typed("submit run.yaml").out
        assert f"all 3 {waits}" in said
        job = said.split()[2]
        assert "JobState=PENDING" in cluster.run("scontrol", "show", "job", job)
        cluster.run("scancel", job)
        said = typed("jobs resume run --nodes 2 --gpus_per_node a100:1").out
        assert f"all 2 {waits}" in said
        typed("jobs resume run --nodes 2 --dry_run", code=2)  # it has a job already
        cluster.run("scancel", said.split()[2])
        cluster.undrain(cluster.nodes[0])
        state = ["sinfo", "-h", "-o", "%T", "-n", cluster.nodes[0]]
        until(lambda: "idle\n" in cluster.run(*state), lambda: cluster.run(*state))
        assert f"1 of 2 {waits}" in typed("jobs resume run --nodes 2 --dry_run").out
    finally:
        for name in cluster.nodes:
            if "DRAIN" in cluster.run("scontrol", "show", "node", name):
                cluster.undrain(name)


def test_a_waiting_job_runs_when_its_nodes_come_back(user: Path, cluster: SlurmCluster, typed: Typed) -> None:
    cluster.kill_node(cluster.nodes[2])
    try:
        said = typed("submit run.yaml --gpus_per_node h100:1").out
        assert "the only node of partition main that fits is down now: the job waits for them\n" in said
        job = said.split()[2]
    finally:
        cluster.start_node(cluster.nodes[2])
    shown = ["scontrol", "--oneliner", "show", "job", job]
    until(lambda: "JobState=RUNNING" in cluster.run(*shown), lambda: cluster.run(*shown))
    cluster.run("scancel", job)


def test_a_partition_that_is_closed_is_told_apart_from_one_that_is_down(
    user: Path, cluster: SlurmCluster, typed: Typed, submitted: Submit
) -> None:
    try:
        cluster.run("scontrol", "update", "partitionname=main", "state=drain")
        said = typed("submit run.yaml", code=2).err
        assert "Required partition not available (inactive or drain)" in said
        cluster.run("scontrol", "update", "partitionname=main", "state=down")
        said, _ = submitted("", hold=False)
        assert "partition main is down now: the job waits for it\n" in said
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
    line = (
        "submit attention_distill_vit_large --nodes 8 --gpus_per_node 8 --cpus_per_task 11 --time 3-00:00:00 "
    )
    line += "--partition main --mem 200G --account lab --setup 'module load cuda' --num_classes none "  # it has two
    printed = typed(f"{line} --output_dir {tmp_path}/distill --data_path {images} --dry_run").out
    assert sorted(tmp_path.rglob("*")) == before
    plan, mark, script = printed.partition("#!/bin/bash")
    assert "2048" in plan  # 8 x 8 x 32, the published batch
    assert [option for option in WANTED if f"#SBATCH {option}\n" not in script] == [], script
    assert "module load cuda\n" in script
    done = subprocess.run(["sbatch", "--test-only"], input=mark + script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "using 704 processors on nodes" in done.stderr
    assert big.run("squeue", "-h") == ""
