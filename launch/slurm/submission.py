"""A submission from its checks to its job numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...models.errors import ConfigError
from ...transfer.config import RunConfig
from .checks import check_commands, check_folder, check_resources
from .files import JobFolder
from .registry import remember
from .requests import Plan
from .scheduler import job_states
from .settings import ClusterConfig
from .submit import Launch, Request, script, submit, test_only

ENDED = (
    "UNKNOWN",
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
)


def check(plan: Plan, config: ClusterConfig, *, unchecked: bool = False) -> None:
    """Raises ConfigError, DataError or another GraftError for what cannot run as it is asked for."""
    from ..plan import describe_plan  # loads torch

    if config.cluster != "slurm" and config.nodes > 1:
        raise ConfigError(
            f"--nodes {config.nodes}: --cluster {config.cluster} is this machine alone; give --nodes 1"
        )
    if config.cluster == "debug" and config.tasks > 1:
        raise ConfigError(
            f"--cluster debug is this process alone, and {config.tasks} are asked for: give one GPU or task"
        )
    if config.cluster == "slurm":
        check_commands()
    _check_not_running(plan)
    if unchecked:
        return
    if config.cluster == "slurm":
        check_folder(plan.folder, config)
        check_resources(config, cores(plan.configs, config))
    for run in plan.configs:
        _check_data(run)
        describe_plan(run, config.world_size)


def describe(plan: Plan, config: ClusterConfig, *, unchecked: bool = False) -> str:
    """The resolved plan, the cells, and the script as sbatch gets it. Raises ConfigError where sbatch refuses it."""
    from ..plan import describe_plan

    parts = [] if unchecked else [describe_plan(run, config.world_size) for run in plan.configs]
    if len(plan.requests) > 1:
        names = "".join(f"  {request.output_dir.name}\n" for request in plan.requests)
        parts.append(f"{len(plan.requests)} cells, {config.array_parallelism} at a time:\n{names}")
    if config.cluster != "slurm":
        return "\n".join([*parts, f"--cluster {config.cluster}: {config.tasks} processes on this machine\n"])
    with tempfile.TemporaryDirectory() as scratch:  # a dry run leaves nothing behind
        launch = _launch(plan, plan.requests, config)
        shown = Launch(launch.name, Path(scratch), launch.requests, config, launch.cpus_per_task)
        text = script(shown).replace(scratch, str(plan.folder))
        if not unchecked:
            test_only(shown)
    return "\n".join([*parts, text])


def send(plan: Plan, config: ClusterConfig, *, unchecked: bool = False) -> str:
    """Submits, and says which jobs these are and what to do next."""
    plan.write()
    if plan.first is not None:
        before = submit(_launch(plan, [plan.first], config, "-teacher"))[0]
        if config.cluster == "slurm":
            more = {**config.sbatch, "kill-on-invalid-dep": "yes"}
            config = config.model_copy(update={"dependency": f"afterok:{before}", "sbatch": more})
    return start(plan.folder, _launch(plan, plan.requests, config), unchecked=unchecked)


def start(folder: Path, launch: Launch, *, unchecked: bool = False) -> str:
    """Submits `launch`, and says which jobs these are and what to do next."""
    if launch.config.cluster == "slurm" and not unchecked:
        test_only(launch)
    jobs = submit(launch)
    remember(folder)
    many = f" ({len(jobs)} cells)" if len(jobs) > 1 else ""
    return (
        f"submitted job {jobs[0].partition('_')[0]}{many} in {folder}\n"
        f"  graftvit jobs {folder}\n  graftvit logs {folder}{'/cells/...' if many else ''} --follow\n"
    )


def cores(configs: Sequence[RunConfig], config: ClusterConfig) -> int:
    """Of a process: the loader's, and one for the run."""
    return config.cpus_per_task or 1 + max((run.data.workers for run in configs), default=0)


def _launch(plan: Plan, requests: Sequence[Request], config: ClusterConfig, suffix: str = "") -> Launch:
    name = f"graftvit-{plan.folder.name}{suffix}"
    return Launch(name, plan.folder, requests, config, cores(plan.configs, config))


def _check_not_running(plan: Plan) -> None:
    for request in plan.requests:
        job = active_job(request.output_dir)
        if job is not None:
            raise ConfigError(
                f"{request.output_dir} is job {job} already: `graftvit jobs {plan.folder}` shows it, "
                f"`graftvit stop {plan.folder}` ends it"
            )


def active_job(output_dir: Path) -> str | None:
    """The job of a run that waits, runs or will be started again; None where there is no such."""
    submission = JobFolder(output_dir).submission()
    if submission is None or submission.cluster != "slurm":
        return None
    state = job_states([submission.job_id])[submission.job_id].state
    return None if state in ENDED else submission.job_id


def _check_data(run: RunConfig) -> None:
    from ...transfer.data.datasets import check_dataset

    if not run.data.download:
        check_dataset(run.data)
