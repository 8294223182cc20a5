"""Evaluations and conversions as jobs of a real cluster, and data sets on the disks of its nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graftvit.launch.slurm.job_folder import JobFolder
from support.files.image_folders import class_folder
from support.runs.engine_runs import make_teacher
from support.runs.patience import until
from support.slurm.cluster_runs import cluster_run, graftvit
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ALONE = ("--nodes", "1", "--tasks_per_node", "1")


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((folder / "jobs" / "logs").glob("*_log.*")))


def wait_for(folder: Path, outcome: str, attempt: int = 1) -> None:
    def ended() -> bool:
        attempts = JobFolder(folder).attempts()
        return len(attempts) >= attempt and attempts[-1].outcome == outcome

    until(ended, lambda: f"{outcome}: {JobFolder(folder).attempts()}\n{logs(folder)}", every=0.3)


def wait_for_empty_queue(cluster: SlurmCluster) -> None:
    until(lambda: not cluster.run("squeue", "-h").strip(), "an empty queue", every=0.3)


def test_an_evaluation_of_two_nodes_and_a_conversion_come_to_their_end(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """Words that are wrong are refused before anything is queued; relative paths are meant from the user's folder."""
    make_teacher(tmp_path / "teacher")
    evaluation = ("evaluate", "teacher", "--dataset", "digits", "--device", "cpu", "--workers", "0")
    refused = graftvit(cluster, tmp_path, "submit", *evaluation, "--metrcs", "top1", code=2)
    assert "unknown flag '--metrcs', did you mean '--metrics'?" in refused
    assert not cluster.run("squeue", "-h").strip()
    assert not (tmp_path / "runs").exists()

    words = ("submit", *evaluation, "--json", "scores.json", "--tasks_per_node", "1")
    said = graftvit(cluster, tmp_path, *words)
    folder = tmp_path / "runs" / "evaluate-teacher"
    assert f"jobs and log in {folder}" in said
    conversion = ("convert", "teacher", "--plan", "*: linear", "--out", "linear", "--dataset", "digits")
    words = ("submit", *conversion, "--calibrate", "4", *ALONE, "--output_dir", "fitting")
    graftvit(cluster, tmp_path, *words)
    wait_for(folder, "finished")
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {"teacher"}
    assert "teacher" in logs(folder)
    wait_for(tmp_path / "fitting", "finished")
    assert (tmp_path / "linear" / "model.safetensors").is_file()
    wait_for_empty_queue(cluster)
    shown = json.loads(graftvit(cluster, tmp_path, "jobs", str(folder), "fitting", "--json"))
    assert [(run["state"], run["world_size"], run["output"]) for run in shown] == [
        ("finished", 2, str(tmp_path / "scores.json")),
        ("finished", 1, str(tmp_path / "linear")),
    ]


def test_a_benchmark_is_stopped_and_resumed(cluster: SlurmCluster, tmp_path: Path) -> None:
    """It saves nothing after a signal, ends at once, and begins anew in the next job."""
    folder = tmp_path / "runs" / "benchmark-operators"
    words = ("benchmark", "operators", "--operators", "linear", "--tokens", "64", "--repeats", "10000000")
    graftvit(cluster, tmp_path, "submit", *words, *ALONE)
    until(
        lambda: "[1/2] linear, 64 tokens" in logs(folder),
        lambda: f"the first case\n{logs(folder)}",
        every=0.3,
    )
    graftvit(cluster, tmp_path, "stop", str(folder))
    wait_for(folder, "stopped")
    wait_for_empty_queue(cluster)
    graftvit(cluster, tmp_path, "resume", str(folder))
    until(lambda: len(JobFolder(folder).attempts()) == 2, "the second attempt", every=0.3)
    graftvit(cluster, tmp_path, "stop", str(folder), "--now")
    wait_for_empty_queue(cluster)


def test_each_node_copies_the_data_set_once(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The nodes of this cluster are one machine, so that the folder has the node's name."""
    class_folder(tmp_path / "images", train=24)
    make_teacher(tmp_path / "teacher", classes=2)
    data = {
        "dataset": "", "data_path": str(tmp_path / "images"), "stage": "$NODE_DISK/$SLURMD_NODENAME",
        "train_samples": None, "batch_size": 4,
    }  # fmt: skip
    run = cluster_run(cluster, tmp_path, "staged", data=data, optim={"epochs": 1})
    run.submit("--tasks_per_node", "2", "--setup", f"export NODE_DISK={tmp_path}/disks")
    (attempt,) = run.finish()
    assert attempt.world_size == 4
    disks = sorted((tmp_path / "disks").iterdir())
    assert [path.name for path in disks] == sorted(attempt.nodes)
    for disk in disks:
        (copy,) = [path for path in disk.glob("graftvit-data-*/images-*") if path.is_dir()]
        assert sum(path.is_file() for path in copy.rglob("*.png")) == 60
    assert [logs(run.folder).count(words) for words in (": copies ", " is ready")] == [2, 2]
    assert "$NODE_DISK/$SLURMD_NODENAME" in (run.folder / "config.yaml").read_text()
