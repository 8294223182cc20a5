"""From a run and its resources to a job: the frozen configuration, the copy of the code, the executor, the record."""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from ...checkpoints.atomic import write_file
from ...models.errors import ConfigError
from .attempt import Attempt
from .checks import check_script
from .files import JobFolder, Submission
from .pitfalls import detached, outside_of_a_job, start_script
from .settings import ClusterConfig
from .snapshot import copy_package, origin


@dataclass(frozen=True)
class Request:
    """One run to submit: the words after `graftvit`, and the folder that it writes."""

    words: list[str]
    output_dir: Path


@dataclass(frozen=True)
class Launch:
    """Runs that go to the cluster together, as one job or as one array, and what they ask of it."""

    name: str
    folder: Path
    """Its `jobs/` has the logs, the copy of the code and what submitit writes."""
    requests: Sequence[Request]
    config: ClusterConfig
    cpus_per_task: int
    after: str | None = None
    """The job that has to finish before; where it does not, these are cancelled."""

    @property
    def logs(self) -> Path:
        return self.folder / "jobs" / "logs"

    @property
    def start(self) -> Path:
        """The script that starts the interpreter of each task."""
        return self.folder / "jobs" / "start.sh"


def executor_of(launch: Launch) -> submitit.AutoExecutor:
    """The executor, its resources set; nothing is written."""
    config = launch.config
    python = f"sh {shlex.quote(str(launch.start))}"
    executor = submitit.AutoExecutor(
        folder=launch.logs, cluster=config.cluster, slurm_python=python, local_python=python
    )
    executor.update_parameters(**_common(launch))
    if config.cluster == "slurm":
        executor.update_parameters(**_of_slurm(launch))
    elif config.cluster == "local" and config.setup:
        executor.update_parameters(local_setup=list(config.setup))
    return executor


def script(launch: Launch) -> str:
    """The sbatch script, as it would be submitted; nothing is written."""
    executor: Any = executor_of(launch)._executor
    count = len(launch.requests)
    if count > 1:
        executor.parameters["map_count"] = count  # as submitit does for an array
    return str(executor._make_submission_file_text(executor._submitit_command_str, "%j"))


def test_only(launch: Launch) -> None:
    """Raises ConfigError where sbatch would refuse the job. Nothing is queued, and nothing written to its folder."""
    with outside_of_a_job(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.sh"
        path.write_text(script(launch), encoding="utf-8")
        check_script(path)


def submit(launch: Launch) -> list[str]:
    """Submits, and returns the job of each request. What was submitted stands in each run folder.

    Raises ConfigError: the cluster refused.
    """
    code = copy_package(launch.folder / "jobs")
    directory = Path.cwd()
    attempts = [Attempt(request.words, request.output_dir, directory) for request in launch.requests]
    apart = detached(launch.logs / "controller.log") if launch.config.cluster == "local" else nullcontext()
    with outside_of_a_job():
        launch.logs.mkdir(parents=True, exist_ok=True)
        write_text(launch.start, start_script(code))
        executor = executor_of(launch)
        for request in launch.requests:
            JobFolder(request.output_dir).stop_path.unlink(missing_ok=True)
        try:
            with apart:
                jobs = (
                    executor.submit_array(attempts) if len(attempts) > 1 else [executor.submit(attempts[0])]
                )
        except submitit.core.utils.FailedJobError as error:
            raise ConfigError(f"the cluster refused the job: {' '.join(str(error).split())}") from error
    made = origin()
    for request, job in zip(launch.requests, jobs, strict=True):
        _record(launch, request, str(job.job_id), code, made)
    if launch.config.cluster == "debug":
        for job in jobs:
            job.results()
    return [str(job.job_id) for job in jobs]


def _record(launch: Launch, request: Request, job_id: str, code: Path, made: dict[str, Any]) -> None:
    folder = JobFolder(request.output_dir)
    before = folder.submission()
    folder.write_submission(
        Submission(
            job_id=job_id,
            cluster=launch.config.cluster,
            submitted=time.time(),
            command=request.words,
            logs=str(launch.logs),
            resources=launch.config.model_dump(mode="json"),
            code=str(code),
            directory=os.getcwd(),  # noqa: PTH109
            cpus_per_task=launch.cpus_per_task,
            origin=made,
            earlier=[] if before is None else [*before.earlier, before.job_id],
        )
    )


def _common(launch: Launch) -> dict[str, Any]:
    """Resources under the names that submitit has for every cluster."""
    config = launch.config
    common: dict[str, Any] = {
        "name": launch.name,
        "timeout_min": config.minutes,
        "nodes": config.nodes,
        "tasks_per_node": config.tasks,
    }
    if config.gpus_per_node:
        common["gpus_per_node"] = config.gpus_per_node
    return common


def _of_slurm(launch: Launch) -> dict[str, Any]:
    config = launch.config
    more: dict[str, Any] = {"requeue": True, "chdir": os.getcwd(), **config.sbatch}  # noqa: PTH109
    steps = [
        f"--cpus-per-task={launch.cpus_per_task}",
        "--kill-on-bad-exit=1",
    ]  # srun >= 22.05 inherits no cores
    if config.container:
        steps.append(f"--container-image={config.container}")
    if config.container_mounts:
        steps.append(f"--container-mounts={config.container_mounts}")
    optional = {
        name: getattr(config, name)
        for name in ("partition", "account", "qos", "constraint", "exclude", "comment", "dependency", "mem")
    }
    if launch.after is not None:
        optional["dependency"] = f"afterok:{launch.after}"
        more["kill-on-invalid-dep"] = "yes"
    return {
        "cpus_per_task": launch.cpus_per_task,
        "slurm_signal_delay_s": config.signal_delay,
        "slurm_array_parallelism": config.array_parallelism,
        "slurm_setup": list(config.setup),
        "slurm_srun_args": steps,
        "slurm_additional_parameters": more,
        **{f"slurm_{name}": value for name, value in optional.items() if value is not None},
    }


def write_text(path: Path, text: str) -> None:
    """A file of text, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_file(path, write, size=len(text))
