"""Commands as jobs of a real cluster, runs that wait for others, lines on each node, and what a job leaves there."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from graftvit.launch.slurm.folder import JobFolder
from support.files.image_folders import class_folder
from support.runs.engine_runs import make_teacher
from support.runs.patience import until
from support.slurm.cluster_runs import ALONE, cluster_run, field, graftvit, held, wait_for_the_end
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((folder / "jobs" / "logs").glob("*_log.*")))


def wait_for(folder: Path, outcome: str, attempt: int = 1) -> None:
    def ended() -> bool:
        attempts = JobFolder(folder).attempts()
        return len(attempts) >= attempt and attempts[-1].outcome == outcome

    until(ended, lambda: f"{outcome}: {JobFolder(folder).attempts()}\n{logs(folder)}", every=0.3)


def test_an_evaluation_of_two_nodes_and_a_conversion_come_to_their_end(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """Relative paths are meant from the user's folder."""
    make_teacher(tmp_path / "teacher")
    evaluation = "submit evaluate teacher --dataset digits --device cpu --workers 0 --json scores.json"
    said = graftvit(cluster, tmp_path, *evaluation.split(), "--tasks_per_node", "1")
    folder = tmp_path / "runs" / "evaluate-teacher"
    assert f"jobs and log in {folder}" in said
    conversion = "submit convert teacher --plan *:linear --output_dir linear --dataset digits --calibrate 4"
    graftvit(cluster, tmp_path, *conversion.split(), *ALONE, "--job_dir", "fitting")
    wait_for(folder, "finished")
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {"teacher"}
    assert "teacher" in logs(folder)
    wait_for(tmp_path / "fitting", "finished")
    assert (tmp_path / "linear" / "model.safetensors").is_file()
    wait_for_the_end(cluster)
    shown = json.loads(graftvit(cluster, tmp_path, "jobs", str(folder), "fitting", "--json"))
    assert [(run["state"], run["world_size"], run["output"]) for run in shown] == [
        ("finished", 2, str(tmp_path / "scores.json")),
        ("finished", 1, str(tmp_path / "linear")),
    ]


def test_a_benchmark_is_stopped_and_resumed(cluster: SlurmCluster, tmp_path: Path) -> None:
    """It saves nothing after a signal, ends at once, and begins anew in the next job."""
    folder = tmp_path / "runs" / "benchmark-operators"
    words = "submit benchmark operators --operators linear --tokens 64 --repeats 10000000"
    graftvit(cluster, tmp_path, *words.split(), *ALONE)
    until(lambda: "[1/2] linear, 64 tokens" in logs(folder), lambda: logs(folder), every=0.3)
    graftvit(cluster, tmp_path, "jobs", "stop", str(folder))
    wait_for(folder, "stopped")
    wait_for_the_end(cluster)
    graftvit(cluster, tmp_path, "jobs", "resume", str(folder))
    until(lambda: len(JobFolder(folder).attempts()) == 2, "the second attempt", every=0.3)
    graftvit(cluster, tmp_path, "jobs", "stop", str(folder), "--now")
    wait_for_the_end(cluster)


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


SHORT = {"optim": {"max_steps": 20}}


def test_what_waits_for_a_run_that_is_stopped_is_cancelled(cluster: SlurmCluster, tmp_path: Path) -> None:
    first = cluster_run(cluster, tmp_path, "first", optim={"epochs": 4000}, data={"batch_size": 16})
    second = cluster_run(cluster, tmp_path, "second", **SHORT)
    after = ("--after", str(first.folder))
    before = first.submit(*ALONE)
    job = second.submit(*ALONE, *after)
    assert field(cluster, job, "Dependency") == f"afterok:{before}(unfulfilled)"
    first.wait_for_lines(1)
    first.graftvit("jobs", "stop", str(first.folder))  # it has not finished, though it ends without an error
    until(lambda: field(cluster, job, "JobState") == "CANCELLED", lambda: cluster.run("squeue"), every=0.5)
    assert not second.jobs.attempts()
    said = first.graftvit("jobs", "resume", str(second.folder), *after, code=2)
    assert f"--after {first.folder}: {first.folder} has neither finished nor a job that could: " in said


def test_a_run_begins_when_another_has_finished(cluster: SlurmCluster, tmp_path: Path) -> None:
    first = cluster_run(cluster, tmp_path, "first", **SHORT)
    second = cluster_run(cluster, tmp_path, "second", **SHORT)
    after = ("--after", str(first.folder))
    with held(cluster) as until_it_is_watched:
        before = first.submit(*ALONE, *until_it_is_watched)
        job = second.submit(*ALONE, *after)
    first.wait_for_attempt(1)
    cluster.run("scontrol", "requeue", before)  # the same number goes on
    (attempt,) = second.finish()
    last = first.jobs.attempts()[-1]
    assert (last.job_id, last.restart, last.outcome) == (before, 1, "finished")
    assert last.ended is not None
    assert attempt.started >= last.ended
    third = cluster_run(cluster, tmp_path, "third", **SHORT)
    job = third.submit(*ALONE, *after, "--sbatch", "hold")  # nothing is left to wait for
    assert field(cluster, job, "Dependency") == "(null)"
    cluster.run("scancel", job)


def test_lines_that_run_once_on_each_node(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = cluster_run(cluster, tmp_path, optim={"max_steps": 5})
    seen = tmp_path / "seen"
    lines = ["export HERE='a \"b\" c'", f'echo "$SLURM_NODEID $SLURM_CPUS_PER_TASK $HERE" >> {seen}']
    words = [word for line in lines for word in ("--node_setup", line)]
    run.submit("--tasks_per_node", "2", "--setup", "export FIRST=1", *words)
    run.finish()
    assert sorted(seen.read_text().splitlines()) == ['0 2 a "b" c', '1 2 a "b" c']  # of two processes a node


def test_a_line_that_fails_on_a_node_ends_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = cluster_run(cluster, tmp_path, **SHORT)
    job = run.submit("--node_setup", '[ "$SLURM_NODEID" = 0 ] || ls /no-such-folder', "--node_setup", "true")
    until(lambda: field(cluster, job, "JobState") == "FAILED", lambda: cluster.run("squeue"), every=0.5)
    assert not run.jobs.attempts()
    assert "/no-such-folder" in run.logs()


def test_a_job_that_is_preempted_in_its_lines_is_started_again(
    start_cluster: Callable[..., SlurmCluster], tmp_path: Path
) -> None:
    cluster = start_cluster(user_signal=True, grace=1)
    run = cluster_run(cluster, tmp_path, **SHORT)
    once = tmp_path / "once"
    job = run.submit("--node_setup", f"[ -e {once} ] || {{ touch {once}; sleep 60; }}")
    until(once.exists, lambda: cluster.run("squeue"))
    cluster.run("sbatch", "-p", "high", "-N", "3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    run.finish()
    assert field(cluster, job, "Restarts") == "1"


def test_all_that_a_job_writes_follows_the_umask_of_who_submitted_it(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """A colleague of the group can load the student."""
    run = cluster_run(cluster, tmp_path, optim={"epochs": 1}, data={"batch_size": 16})
    before = os.umask(0o027)
    try:
        job = run.submit(*ALONE)
        run.finish()
        until(lambda: field(cluster, job, "JobState") == "COMPLETED", "the end of the job")
    finally:
        os.umask(before)
    wrong = {}
    for path in [run.folder, *run.folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        wanted = (0o777 if path.is_dir() else 0o666) & ~0o027
        if mode & 0o666 != wanted & 0o666 or (path.is_dir() and mode & 0o777 != wanted):
            wrong[str(path.relative_to(run.folder))] = oct(mode)
    assert not wrong
