"""A bad request gets its one sentence before anything is queued or written; a good one is what sbatch accepts."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from graftvit.launch.cli import main
from graftvit.launch.slurm import checks
from graftvit.launch.slurm import checks as inventory
from graftvit.launch.slurm.checks import check_commands, check_folder
from graftvit.launch.slurm.settings import ClusterConfig
from graftvit.models.errors import ConfigError
from PIL import Image
from support.slurm.cluster_users import user_with_recipe, write_site
from support.slurm.slurm_cluster import SlurmCluster

StartCluster = Callable[..., SlurmCluster]
Refusal = Callable[..., str]


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return user_with_recipe(tmp_path, monkeypatch, {}, gpus_per_node=0)


@pytest.fixture
def on_cluster(user: Path, cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    return user


def everything(root: Path) -> list[Path]:
    return sorted(root.rglob("*"))


@pytest.fixture
def refused(on_cluster: Path, cluster: SlurmCluster, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Runs `graftvit submit`, which must refuse in one sentence, queue nothing and leave no file."""

    def submit(*words: str, recipe: str = "run.yaml", queued: int = 0) -> str:
        before = everything(on_cluster)
        assert main(["submit", recipe, *words]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        told = said.err.removeprefix(CHECKING)
        assert told.count("\n") == 1, said.err
        assert told.startswith("graftvit: error: ")
        assert len(cluster.run("squeue", "-h").splitlines()) == queued
        assert everything(on_cluster) == before
        return told

    return submit


CHECKING = "graftvit: checking the run: its settings, teacher, data and plan ...\n"


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--partition", "hihg"], "is hihg: no partition of this cluster is called 'hihg'; did you mean 'high'?"),
        (["--partition", "main,hihg"], "--partition is main,hihg: no partition of this cluster is called 'hihg'"),
        (["--partition", "main,"], "--partition is 'main,': a name, or names with commas between them"),
        (["--nodes", "4"], "--nodes is 4: partition main has 3; `--unchecked` submits it all the same\n"),
        (["--nodes", "4", "--partition", "main,high"], "--nodes is 4: partition main has 3; `--unchecked` submits"),
        (["--gpus_per_node", "5"], "--gpus_per_node is 5: partition main has nodes with up to 4 GPUs"),
        (["--gpus_per_node", "a100:1"], "--gpus_per_node is a100:1: partition main has nodes with up to 0 GPUs of"),
        (["--gres", "gpu:5"], "--gres is gpu:5: partition main has nodes with up to 4 GPUs"),
        (["--gres", "tmpdisc:5"], "--gres is tmpdisc:5: partition main has nodes with up to 0 tmpdisc, and 0 of its"),
        (["--gres", "tmpdisk:5"], "--gres is tmpdisk:5: partition main has nodes with up to 0 tmpdisk, and 0 of its"),
        (["--mem_per_cpu", "5G"], "--mem_per_cpu x cores a node is 5120: partition main has nodes with up to 4000 MiB"),
        (["--mem_per_gpu", "3G", "--gpus_per_node", "2"], "--mem_per_gpu x GPUs a node is 6144: partition main"),
        (["--mail", "never"], "--mail is 'never': valid are one address and NONE, BEGIN, END"),
        (["--after", "/nowhere"], "/nowhere is no folder"),
        (["--cpus_per_task", "9"], "--cpus_per_task x tasks a node is 9: partition main has nodes with up to 8 cores"),
        (["--cpus_per_task", "3", "--tasks_per_node", "3"], "is 9: partition main has nodes with up to 8 cores"),
        (["--mem", "5G"], "--mem is 5120: partition main has nodes with up to 4000 MiB of memory"),
        (["--output_dir", "/var/tmp/graftvit-run"], "cluster.yaml: shared_folders: "),
        (["--data.dataset", "folder", "--data_path", "nowhere"], "nowhere"),
        (["--data.dataset", "torch/cifar10", "--data_path", "nowhere", "--data.num_classes", "10"], "nowhere"),
        (["--data.train_samples", "1", "--nodes", "2"], "has 1 images, fewer than 2 ranks"),
        (["--constraint", "a100"], "sbatch refuses the job: Invalid feature specification; `--dry_run` prints"),
        (["--exclude", "n77"], "sbatch refuses the job: Invalid node name specified"),
        (["--reservation", "weekend"], "sbatch refuses the job: Requested reservation is invalid"),
        (["--sbatch", "nosuch=1"], "sbatch refuses the job: unrecognized option '--nosuch=1'"),
        (["--sbatch", "mail-type=NEVER"], "sbatch refuses the job: Invalid --mail-type specification"),
        (["--dependency", "afterwards:3"], "sbatch refuses the job"),
        (["--time", "tomorrow"], "--time is 'tomorrow'"),
        (["--time", "1"], "--time is 1: a run needs a minute to start, and is told to save 90 seconds before"),
        (["--node", "2"], "--nodes"),
        (["--cluster", "local", "--nodes", "2"], "--nodes is 2: --cluster local is this machine alone"),
        (["--cluster", "debug", "--tasks_per_node", "2"], "--cluster debug is this process alone"),
        (["--site", "nowhere.yaml"], "--site nowhere.yaml does not exist"),
    ],
)  # fmt: skip
def test_a_bad_request(refused: Refusal, words: list[str], said: str) -> None:
    assert said in refused(*words)


@pytest.mark.slurm
@pytest.mark.parametrize(
    "words",
    [["--partition", "hihg"], ["--nodes", "4"], ["--exclude", "n77"], ["--mem", "5G"], ["--time", "1"]],
)
def test_a_dry_run_prints_the_script_of_what_is_refused(
    words: list[str], on_cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "run.yaml", *words, "--dry_run"]) == 2
    said = capsys.readouterr()
    assert f"#SBATCH {words[0]}={words[1]}\n" in said.out
    assert "images" not in said.out  # the plan, which takes long
    assert said.err.startswith("graftvit: error: ")


@pytest.mark.slurm
def test_an_unknown_recipe(refused: Refusal) -> None:
    assert "did you mean 'attention_distill_vit_large'?" in refused(recipe="attention_distill_vit_larg")


@pytest.mark.slurm
def test_limits_of_a_partition(refused: Refusal, cluster: SlurmCluster) -> None:
    cluster.run("scontrol", "update", "partitionname=high", "maxtime=1-0", "maxnodes=2")
    try:
        said = refused("--partition", "high", "--time", "24:00:01")
        assert "--time is 24:00:01: partition high allows 1-00:00:00 at most" in said
        said = refused("--partition", "high", "--nodes", "3", "--time", "60")
        assert "--nodes is 3: partition high gives a job 2 at most" in said
    finally:
        cluster.run("scontrol", "update", "partitionname=high", "maxtime=infinite", "maxnodes=unlimited")


@pytest.mark.slurm
def test_without_a_default_partition(refused: Refusal, cluster: SlurmCluster) -> None:
    cluster.run("scontrol", "update", "partitionname=main", "default=no")
    try:
        assert "--partition is not given and the cluster has no default one: valid: main, high" in refused()
    finally:
        cluster.run("scontrol", "update", "partitionname=main", "default=yes")


@pytest.mark.slurm
def test_no_shared_folder_is_named(refused: Refusal, on_cluster: Path) -> None:
    write_site(gpus_per_node=0)
    said = refused("--output_dir", "/tmp/graftvit-nobody-shares-this")
    assert "is on this machine alone, and the nodes of the job would not see it" in said
    assert "shared_folders in the site file" in said


@pytest.mark.slurm
def test_a_run_that_is_queued_already(
    refused: Refusal, on_cluster: Path, cluster: SlurmCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "run.yaml", "--sbatch", "hold"]) == 0
    job = capsys.readouterr().out.split()[2]
    try:
        said = refused(queued=1)
        assert f"{on_cluster / 'run'} is job {job} already" in said
        assert "graftvit stop" in said
    finally:
        cluster.run("scancel", job)
    assert main(["submit", "run.yaml", "--sbatch", "hold"]) == 0  # and it is free again
    cluster.run("scancel", "--me")


@pytest.mark.slurm
def test_a_folder_with_unusual_letters(
    on_cluster: Path, cluster: SlurmCluster, capsys: pytest.CaptureFixture[str], refused: Refusal
) -> None:
    folder = on_cluster / 'my run\'s "best"'
    words = ["--output_dir", str(folder), "--comment", "it's 5 o'clock", "--sbatch", "hold"]
    assert main(["submit", "run.yaml", *words, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert main(["submit", "run.yaml", *words]) == 0
    job = capsys.readouterr().out.split()[2]
    shown = cluster.run("scontrol", "show", "job", job)
    cluster.run("scancel", job)
    assert f"StdOut={folder}/jobs/logs/{job}_0_log.out" in shown
    assert "Comment=it's 5 o'clock" in shown
    (script,) = (folder / "jobs").glob("launch-*/submit.sh")
    shown_as = re.search(r"launch-[0-9a-f]{8}", printed)
    assert shown_as is not None
    sent = script.read_text().replace(script.parent.name, shown_as[0])
    assert printed.endswith(sent + "\n")  # a dry run shows what is sent, to the letter
    assert "has a %, which Slurm replaces" in refused("--output_dir", str(on_cluster / "50%job"))


def test_without_slurm(
    user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(user))
    before = everything(user)
    assert main(["submit", "run.yaml"]) == 2
    said = capsys.readouterr().err
    assert "--cluster slurm: no sbatch, scontrol, sinfo, srun here; submit from a login node" in said
    assert said.count("\n") == 1
    assert everything(user) == before


def test_a_cluster_that_does_not_answer(
    user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sbatch", "scontrol", "sinfo", "srun"):
        program = user / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\necho 'slurm_load: Unable to contact\nslurm controller' >&2; exit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{user / 'bin'}:{os.environ['PATH']}")
    assert main(["submit", "run.yaml"]) == 2
    said = capsys.readouterr().err
    assert "scontrol does not reach the cluster: slurm_load: Unable to contact slurm controller" in said
    assert not (user / "run").exists()


@pytest.mark.parametrize("missing", ["sinfo", "srun"])
def test_every_command_is_looked_for(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {"sbatch", "scontrol", "sinfo", "srun"} - {missing}:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"no {missing} here"):
        check_commands()


def test_folders_that_nodes_do_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = ClusterConfig(shared_folders=(tmp_path / "scratch",))
    check_folder(tmp_path / "scratch" / "new" / "run", shared)
    check_folder(tmp_path / "scratch", shared)
    for outside in (tmp_path / "scratch2", tmp_path / "scratch" / ".." / "run"):
        with pytest.raises(ConfigError, match="in none of the folders"):
            check_folder(outside, shared)
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    check_folder(tmp_path / "link" / "run", shared)
    monkeypatch.setattr(checks, "TEMPORARY", ())
    check_folder(tmp_path / "run", ClusterConfig())
    for kind in ("tmpfs", "ramfs"):
        monkeypatch.setattr(checks, "_file_system", lambda _, kind=kind: kind)
        with pytest.raises(ConfigError, match="on this machine alone"):
            check_folder(tmp_path / "run", ClusterConfig())


def test_the_file_system_of_a_folder_that_is_yet_to_be_made() -> None:
    assert checks._file_system(Path("/proc/self/new/folder")) == "proc"
    if os.path.ismount("/dev/shm"):
        assert checks._file_system(Path("/dev/shm/new/folder")) == "tmpfs"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = ClusterConfig(shared_folders=(tmp_path,))
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(ConfigError, match="is a file"):
            check_folder(tmp_path / place, shared)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    with pytest.raises(ConfigError, match=f"{tmp_path} is not yours to write"):
        check_folder(tmp_path / "a" / "b", shared)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (None, 0),
        ("0", 0),
        ("4000", 4000),
        ("2G", 2048),
        ("2gb", 2048),
        ("1T", 1 << 20),
        ("512K", 0),
        ("2048kb", 2),
    ],
)
def test_sizes_of_memory(text: str | None, size: int) -> None:
    assert checks._mebibytes(text) == size


def test_nodes_as_sinfo_prints_them(monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "a|64|515000|idle|gpu:a100:8(S:0-1)\nb|64+|257000+|mixed-|gpu:1\n"
        "a|64|515000|idle|gpu:a100:8(S:0-1)\nc|8|100|drained*|(null)\n"
    )
    said += "d|8|100|idle*|gpu:tesla:2,gpu:kepler:1,gpu_mem:40\n"
    monkeypatch.setattr(inventory, "output", lambda *command: said)
    assert [(node.name, node.cpus, node.gpus, node.away) for node in inventory.nodes_of("p")] == [
        ("a", 64, {"a100": 8}, ""), ("b", 64, {"": 1}, ""), ("c", 8, {}, "drained"),
        ("d", 8, {"tesla": 2, "kepler": 1}, "down"),
    ]  # fmt: skip
    partitions = "PartitionName=p Default=YES MaxTime=UNLIMITED MaxNodes=UNLIMITED\n"
    monkeypatch.setattr(inventory, "output", lambda *command: said if command[0] == "sinfo" else partitions)
    checks.check_resources(ClusterConfig(gpus_per_node=1, nodes=3), 1)
    checks.check_resources(ClusterConfig(gpus_per_node="A100:8", tasks_per_node=1), 1)
    with pytest.raises(ConfigError, match="1 of its 4 nodes have so many; 2 are asked for"):
        checks.check_resources(ClusterConfig(gpus_per_node="a100:1", nodes=2), 1)
    with pytest.raises(ConfigError, match="2 of its 4 nodes have so many; 3 are asked for"):
        checks.check_resources(ClusterConfig(gpus_per_node=2, nodes=3), 1)
    with pytest.raises(ConfigError, match="cores"):  # those with the GPUs are not those with the cores
        checks.check_resources(ClusterConfig(gpus_per_node=2, nodes=2, tasks_per_node=1), 64)


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


@pytest.mark.slurm
def test_the_script_of_the_published_recipe_is_accepted(
    user: Path,
    start_cluster: StartCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    big = start_cluster(nodes=8, gpus=8, cpus=96, memory=250_000)
    for name, value in big.environment.items():
        monkeypatch.setenv(name, value)
    images = write_images(user / "imagenet", 2048)
    before = everything(user)
    words = ["--nodes", "8", "--gpus_per_node", "8", "--cpus_per_task", "11", "--time", "3-00:00:00"]
    words += ["--partition", "main", "--mem", "200G", "--account", "lab", "--setup", "module load cuda"]
    words += ["--output_dir", str(user / "distill"), "--data_path", str(images)]
    words += ["--num_classes", "none"]  # the stand-in has two
    assert main(["submit", "attention_distill_vit_large", *words, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert everything(user) == before
    plan, mark, script = printed.partition("#!/bin/bash")
    assert "2048" in plan  # 8 x 8 x 32, the published batch
    for option in WANTED:
        assert f"#SBATCH {option}\n" in script, script
    assert "module load cuda\n" in script
    done = subprocess.run(
        ["sbatch", "--test-only"], input=mark + script, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "using 704 processors on nodes" in done.stderr
    assert big.run("squeue", "-h") == ""
