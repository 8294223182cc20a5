"""Distillation on digits through `graftvit submit` on a test's Slurm cluster, and what happens to it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import submitit
import yaml
from graftvit.launch.slurm.folder import Attempt, JobFolder
from graftvit.transfer.config import RunConfig
from support.hub.ports import free_ports
from support.runs import commands
from support.runs.engine_runs import config, differences, make_teacher
from support.runs.patience import until
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_processes import marked

ALONE = ("--nodes", "1", "--tasks_per_node", "1")
RESOURCES = {"nodes": 2, "tasks_per_node": 1, "gpus_per_node": 0, "cpus_per_task": 1, "time": "2:00:00"}


def tasks_of(job_id: str) -> list[int]:
    """The process numbers of the tasks of a job, on whatever node."""
    found = [process.pid for process in marked({"SLURM_JOB_ID": job_id})]
    return [pid for pid in found if _command_of(pid).startswith(f"{sys.executable} -u -m submitit")]


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@dataclass
class ClusterRun:
    """A run folder on a cluster, with a user's site file and the commands that he would type."""

    cluster: SlurmCluster
    root: Path
    config: RunConfig

    @property
    def folder(self) -> Path:
        return self.config.output_dir

    @property
    def jobs(self) -> JobFolder:
        return JobFolder(self.folder)

    @property
    def environment(self) -> dict[str, str]:
        return user_environment(self.cluster, self.root)

    def graftvit(self, *words: str, code: int = 0) -> str:
        return graftvit(self.cluster, self.root, *words, code=code)

    def shown(self) -> dict[str, Any]:
        """What `graftvit jobs` says of it."""
        (status,) = json.loads(self.graftvit("jobs", str(self.folder), "--json"))
        return dict(status)

    def wait_for_state(self, state: str) -> dict[str, Any]:
        until(
            lambda: self.shown()["state"] == state,
            lambda: f"{state}: {self.shown()}\n{self.logs()}",
            every=0.5,
        )
        return self.shown()

    def recipe(self) -> str:
        path = self.root / f"{self.folder.name}.yaml"
        path.write_text(yaml.safe_dump(self.config.model_dump(mode="json")))
        return str(path)

    def submit(self, *words: str) -> str:
        """The job's number."""
        self.graftvit("submit", self.recipe(), *words)
        submission = self.jobs.job()
        assert submission is not None
        return submission.job_id

    def lines(self) -> int:
        path = self.folder / "log.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def wait_for_lines(self, count: int) -> None:
        what = f"{count} records in {self.folder}/log.jsonl"
        until(lambda: self.lines() >= count, lambda: f"{what}\n{self.logs()}")

    def wait_for_attempt(self, number: int) -> None:
        until(lambda: len(self.jobs.attempts()) >= number, lambda: f"attempt {number}\n{self.logs()}")

    def finish(self) -> list[Attempt]:
        """Waits for the end of the run, and gives its attempts."""
        what = f"the end of {self.folder}"
        until(lambda: self._ended() or self._gone(), lambda: f"{what}\n{self.logs()}", every=0.5)
        assert self._ended(), self.logs()
        return self.jobs.attempts()

    def _ended(self) -> bool:
        attempts = self.jobs.attempts()
        return bool(attempts) and attempts[-1].outcome == "finished"

    def _gone(self) -> bool:
        return not self.cluster.run("squeue", "-h").strip() and not self._ended()

    def logs(self) -> str:
        paths = sorted((self.folder / "jobs" / "logs").glob("*_log.*"))
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in paths)


def interrupt(run: ClusterRun, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM and SIGUSR2, as submitit imitates preemption."""
    for name, value in run.cluster.environment.items():
        monkeypatch.setenv(name, value)
    submitit.SlurmJob(folder=run.folder / "jobs" / "logs", job_id=job, tasks=[0])._interrupt()


@contextmanager
def held(cluster: SlurmCluster) -> Iterator[tuple[str, ...]]:
    """Flags for a submission whose job waits until the block has ended."""
    first = cluster.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true").strip()
    try:
        yield "--dependency", f"afterany:{first}"
    finally:
        cluster.run("scancel", first)


def wait_for_the_end(cluster: SlurmCluster) -> None:
    """Of all jobs."""
    until(lambda: not cluster.run("squeue", "-h").strip(), lambda: cluster.run("squeue"), every=0.3)


def field(cluster: SlurmCluster, job: str, name: str) -> str:
    """A field of the controller's record of a job."""
    words = cluster.run("scontrol", "--oneliner", "show", "job", job).split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


def user_environment(cluster: SlurmCluster, root: Path) -> dict[str, str]:
    """A user with a site file for this cluster, and no other configuration."""
    site = root / "config" / "graftvit" / "cluster.yaml"
    if not site.exists():
        site.parent.mkdir(parents=True)
        site.write_text(yaml.safe_dump({**RESOURCES, "shared_folders": [str(root)]}))
    own = {
        "XDG_CONFIG_HOME": str(root / "config"),
        "XDG_STATE_HOME": str(root / "state"),
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **cluster.environment, **own}


def graftvit(cluster: SlurmCluster, root: Path, *words: str, code: int = 0) -> str:
    """What the command prints; `code` is how it must end."""
    done = commands.run(words, user_environment(cluster, root), root)
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stderr


def cluster_run(cluster: SlurmCluster, root: Path, name: str = "run", **sections: Any) -> ClusterRun:
    """Eight epochs of 25 steps; some seconds of training on two ranks."""
    teacher = root / "teacher"
    if not teacher.exists():
        make_teacher(teacher)
    data = {"train_samples": 400, "batch_size": 8, "eval_batch_size": 128}
    steps = "max_steps" in sections.get("optim", {})
    optim = {"blr": 0.03, "ema": 0.9, **({} if steps else {"epochs": 8})}
    engine = {"log_interval": 5, "save_every": 20, "eval_every": 4, "evaluate_teacher": False}
    merged: dict[str, Any] = {"data": data, "optim": optim, "engine": engine}
    for section, values in sections.items():
        merged[section] = {**merged.get(section, {}), **values}
    return ClusterRun(cluster, root, config(root / name, teacher, **merged))


def undisturbed(root: Path, settings: str, ranks: int) -> Path:
    """A run on as many processes of this machine, without a scheduler; once for all tests with the same settings."""
    folder = root / f"undisturbed-{hashlib.sha256(f'{ranks} {settings}'.encode()).hexdigest()[:12]}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the workers of pytest
        if not (folder / "done").exists():
            _train(folder, settings, ranks)
            (folder / "done").touch()
    return folder / "run"


def _train(folder: Path, settings: str, ranks: int) -> None:
    made = {**json.loads(settings), "output_dir": folder / "run"}
    make_teacher(folder / "teacher")
    made["teacher"]["source"] = f"local-dir:{folder / 'teacher'}"
    recipe = folder / "run.yaml"
    recipe.write_text(yaml.safe_dump(RunConfig.model_validate(made).model_dump(mode="json")))
    (port,) = free_ports(1)
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        commands.Command(["train", str(recipe)], _of_rank(rank, shared if ranks > 1 else {}), folder)
        for rank in range(ranks)
    ]
    said = [command.communicate()[1] for command in started]
    assert not any(command.returncode for command in started), "\n".join(said)


def _of_rank(rank: int, shared: dict[str, object]) -> dict[str, str]:
    """The environment of a process as torchrun makes it, or of the only one."""
    own = {"RANK": rank, "LOCAL_RANK": rank} if shared else {}
    variables = {name: str(value) for name, value in {**shared, **own, "OMP_NUM_THREADS": 1}.items()}
    return {**os.environ, **variables}


def assert_undisturbed(run: ClusterRun, ranks: int = 2) -> None:
    """The run has the weights, the optimizer, the average and the log of one that nothing happened to."""
    settings = run.config.model_dump(mode="json", exclude={"output_dir"})
    settings["teacher"]["source"] = None
    workers = "PYTEST_XDIST_WORKER" in os.environ
    shared = run.root.parent.parent if workers else run.root.parent
    whole = undisturbed(shared, json.dumps(settings, sort_keys=True), ranks)
    found = differences(whole, run.folder)
    assert not found, found[:6]
