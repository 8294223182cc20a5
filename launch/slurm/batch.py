"""Make the batch script of a job, with its resources as submitit and sbatch take them. Write and submit nothing."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit

from ...models.errors import ConfigError
from .settings import ClusterConfig, check_line

LOG_START = "GRAFTVIT_LOG_START"
"""The variable with the bytes that earlier attempts have written into the error log of the script and of rank 0.

The script counts them: srun tells there of a rank that fails at once, while the first rank still starts.
"""


@dataclass(frozen=True)
class Request:
    """One run to submit: the words after `graftvit`, and the folder that it writes."""

    words: list[str]
    output_dir: Path


def new_identity() -> str:
    """Return a name for a launch that no other launch of its folder has."""
    return uuid.uuid4().hex[:8]


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
    """The job that has to finish first; if it fails, these jobs are cancelled."""
    identity: str = field(default_factory=new_identity)

    def __post_init__(self) -> None:
        """Check the names of folders.

        Raises ConfigError: one that the script or the list of runs names would end its line.
        """
        for what, folder in (
            ("--output_dir", str(self.folder)),
            ("the folder that you submit from,", str(Path.cwd())),
        ):
            try:
                check_line(folder)
            except ValueError as error:
                raise ConfigError(f"{what} {folder!r} cannot be given to the cluster: {error}") from error

    @property
    def logs(self) -> Path:
        return self.folder / "jobs" / "logs"

    @property
    def place(self) -> Path:
        """The folder in which the job finds what it runs, and in which its number is recorded."""
        return self.folder / "jobs" / f"launch-{self.identity}"

    @property
    def start(self) -> Path:
        """The script that starts the interpreter of each task."""
        return self.place / "start.sh"


def job_name(folder: Path) -> str:
    """Return the job name of a submission to `folder`; it distinguishes runs of the same name in different places."""
    place = folder.resolve()  # whichever link leads to it
    word = re.sub(r"[^\w.,=+-]", "-", place.name)
    return f"graftvit-{word}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"


def executor_of(launch: Launch) -> submitit.AutoExecutor:
    """Return the executor with its resources; write nothing."""
    config = launch.config
    executor = submitit.AutoExecutor(folder=launch.logs, cluster=config.cluster)
    executor.update_parameters(**_common(launch))
    if config.cluster == "slurm":
        executor.update_parameters(**_of_slurm(launch))
    elif config.cluster == "local" and (config.setup or config.node_setup):
        executor.update_parameters(local_setup=[*config.setup, *config.node_setup])
    return executor


def script(launch: Launch) -> str:
    """Return the sbatch script as it would be submitted; write nothing."""
    executor: Any = executor_of(launch)._executor
    count = len(launch.requests)
    if count > 1:
        executor.parameters["map_count"] = count  # as submitit does for an array
    return str(executor._make_submission_file_text(command(launch), "%j"))


def command(launch: Launch) -> str:
    """Return the command of each task: it reads the request from the folder of the launch."""
    return f"sh {shlex.quote(str(launch.start))} -u -m submitit.core._submit {shlex.quote(str(launch.place))}"


def _common(launch: Launch) -> dict[str, Any]:
    """Return the resources by the names that submitit has for every cluster."""
    config = launch.config
    common: dict[str, Any] = {
        "name": launch.name,
        "timeout_min": config.minutes,
        "nodes": config.nodes,
        "tasks_per_node": config.tasks,
    }
    if config.gpu_count and config.cluster != "slurm":
        common["gpus_per_node"] = config.gpu_count
    return common


def _of_slurm(launch: Launch) -> dict[str, Any]:
    config = launch.config
    more: dict[str, Any] = {"requeue": True, "chdir": os.getcwd(), **config.options()}  # noqa: PTH109
    steps = [
        f"--cpus-per-task={launch.cpus_per_task}",
        "--kill-on-bad-exit=1",
    ]  # srun >= 22.05 inherits no cores
    if config.container:
        steps.append(f"--container-image={config.container}")
    if config.container_mounts:
        steps.append(f"--container-mounts={config.container_mounts}")
    if launch.after is not None:
        more["dependency"] = f"afterok:{launch.after}"
        more["kill_on_invalid_dep"] = "yes"
    return {
        "cpus_per_task": launch.cpus_per_task,
        "slurm_signal_delay_s": config.signal_delay,
        "slurm_array_parallelism": config.array_parallelism,
        "slurm_setup": [
            f"export {LOG_START}=$(stat -L -c %s /dev/fd/2)",
            *config.setup,
            *_node_setup(launch),
        ],
        "slurm_teardown": _after_the_end(launch),
        "slurm_srun_args": steps,
        "slurm_additional_parameters": more,
    }


def _node_setup(launch: Launch) -> list[str]:
    """Return a step of one task a node, which has all cores of the job there.

    Signals wait for its end: a preempted job whose step dies of SIGTERM has failed, and is not started again.
    """
    config = launch.config
    if not config.node_setup:
        return []
    lines = "\n".join(["trap '' TERM USR2", *config.node_setup])
    step = [
        f"--nodes={config.nodes}",
        f"--ntasks={config.nodes}",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
    ]
    cores = f"--cpus-per-task={launch.cpus_per_task * config.tasks}"
    return [shlex.join(["srun", *step, cores, "bash", "-e", "-c", lines]) + " || exit $?"]


def _after_the_end(launch: Launch) -> list[str]:
    """Return lines after srun: an error may be one after which the job is started again (`restart`).

    A file system that is away takes the folder along, and often comes back. Where its neighbors are there, or it is
    itself and our part of it is not, somebody has removed or moved that.
    """
    paths = (launch.folder, launch.folder.parent, launch.start, launch.place)
    folder, above, start, place = (shlex.quote(str(path)) for path in paths)
    return [
        "code=$?",
        '[ "$code" -eq 0 ] && exit 0',
        f"for _ in $(seq 30); do [ -d {folder} ] && break; "
        f'[ -n "$(ls -A {above} 2>/dev/null)" ] && exit "$code"; sleep 10; done',
        f'[ -r {start} ] || exit "$code"',
        f'exec sh {start} -m graftvit.launch.slurm.restart {place} "$code"',
    ]
