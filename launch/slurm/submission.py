"""A submission from its checks to its job numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ...models.errors import ConfigError
from ...transfer.config import RunConfig
from .batch import Launch, Request, script
from .checks import check_commands, check_folder, check_resources
from .files import JobFolder
from .registry import remember
from .requests import Plan
from .scheduler import ENDED, UNKNOWN, job_states
from .settings import ClusterConfig
from .submit import submit, test_only


def check(plan: Plan, config: ClusterConfig, *, unchecked: bool = False) -> None:
    """Raises ConfigError, DataError or another GraftError for what cannot run as it is asked for."""
    if config.cluster != "slurm" and config.nodes > 1:
        raise ConfigError(
            f"--nodes {config.nodes}: --cluster {config.cluster} is this machine alone; give --nodes 1"
        )
    if config.cluster == "debug" and config.tasks > 1:
        raise ConfigError(
            f"--cluster debug is this process alone, and {config.tasks} are asked for: give one GPU or task"
        )
    if config.cluster == "local" and len(plan.requests) > config.array_parallelism:
        raise ConfigError(
            f"--cluster local starts all {len(plan.requests)} cells at once, and --array_parallelism allows "
            f"{config.array_parallelism}: allow more of them, or take fewer values"
        )
    if plan.comparison:
        _check_comparison(plan, config)
    if config.cluster == "slurm":
        check_commands()
    _check_not_running(plan)
    if unchecked:
        return
    if config.cluster == "slurm":
        check_folder(plan.folder, config)
        check_resources(config, cores(plan.configs, config))
    from ..plan import describe_plan  # loads torch, which is slow: what can be told without it is told before

    for run in plan.configs:
        _check_data(run)
        describe_plan(run, config.world_size, needs_data=not run.data.download)


def describe(plan: Plan, config: ClusterConfig, *, unchecked: bool = False) -> str:
    """The resolved plan, the cells, and the script as sbatch gets it. Raises ConfigError where sbatch refuses it."""
    from ..plan import describe_plan

    parts = [] if unchecked else [describe_plan(run, config.world_size) for run in plan.configs]
    if plan.first is not None:
        parts.append(f"a job of its own makes the teacher first, in {plan.first.output_dir}\n")
    cells = len(plan.requests) if plan.sweep is None else len(plan.sweep.cells)
    if left_out := cells - len(plan.requests):
        parts.append(f"left out: {left_out} of {cells} cells, which have finished\n")
    if len(plan.requests) > 1:
        names = "".join(f"  {request.output_dir.name}\n" for request in plan.requests)
        parts.append(f"{len(plan.requests)} cells, {config.array_parallelism} at a time:\n{names}")
    return "\n".join([*parts, show(_launch(plan, plan.requests, config), unchecked=unchecked)])


def show(launch: Launch, *, unchecked: bool = False) -> str:
    """How the job would start: its script as sbatch gets it. Raises ConfigError where sbatch refuses it."""
    config = launch.config
    if config.cluster != "slurm":
        return f"--cluster {config.cluster}: {config.tasks} processes on this machine\n"
    if not unchecked:
        test_only(launch)
    return script(launch)


def send(plan: Plan, config: ClusterConfig, *, unchecked: bool = False) -> str:
    """Submits, and says which jobs these are and what to do next."""
    launch = _launch(plan, plan.requests, config)
    if config.cluster == "slurm" and not unchecked:
        test_only(launch)
    plan.write()
    said = start(launch, plan.first, unchecked=True)
    if plan.comparison:
        frozen = next(iter(plan.frozen))
        said += f"  graftvit compare {frozen} --report    # when all cells are through\n"
    return said


def start(launch: Launch, first: Request | None = None, *, unchecked: bool = False) -> str:
    """Submits `launch`, after a job for `first` where it is given, and says which jobs these are."""
    slurm = launch.config.cluster == "slurm"
    if slurm and not unchecked:
        test_only(launch)
    after = ""
    if first is not None:
        made = submit(replace(launch, name=f"{launch.name}-teacher", requests=[first]))[0]
        launch = replace(launch, after=made if slurm else None)
        after = f", after job {made} for the teacher,"
    jobs = submit(launch)
    remember(launch.folder)
    cells = len(jobs) > 1 or launch.folder != launch.requests[0].output_dir
    count = f" ({len(jobs)} cell{'s' if len(jobs) > 1 else ''})" if cells else ""
    return (
        f"submitted job {jobs[0].partition('_')[0]}{count}{after} in {launch.folder}\n"
        f"  graftvit jobs {launch.folder}\n  graftvit logs {launch.folder}{'/cells/...' if cells else ''} --follow\n"
    )


def cores(configs: Sequence[RunConfig], config: ClusterConfig) -> int:
    """Of a process: the loader's, and one for the run."""
    return config.cpus_per_task or 1 + max((run.data.workers for run in configs), default=0)


def _launch(plan: Plan, requests: Sequence[Request], config: ClusterConfig) -> Launch:
    return Launch(f"graftvit-{plan.folder.name}", plan.folder, requests, config, cores(plan.configs, config))


def _check_comparison(plan: Plan, config: ClusterConfig) -> None:
    if config.world_size > 1:
        raise ConfigError(
            f"a cell of a comparison is one process, and {config.nodes} x {config.tasks} are asked for: "
            "give --nodes 1 --gpus_per_node 1 --tasks_per_node 1"
        )
    if plan.first is not None and config.cluster == "local":
        raise ConfigError(
            "--cluster local does not wait for the teacher, which is not there yet: make it first by "
            "`graftvit compare ... --only teacher`, or run all cells one after another without --only"
        )


def _check_not_running(plan: Plan) -> None:
    requests = [*([] if plan.first is None else [plan.first]), *plan.requests]
    active = active_jobs(request.output_dir for request in requests)
    for folder, job in active.items():
        raise ConfigError(
            f"{folder} is job {job} already: `graftvit jobs {plan.folder}` shows it, "
            f"`graftvit stop {plan.folder}` ends it"
        )


def active_jobs(folders: Iterable[Path]) -> dict[Path, str]:
    """Of these runs, those with a job that waits, runs or will be started again, and that job."""
    found = {folder: JobFolder(folder).submission() for folder in folders}
    jobs = {folder: one.job_id for folder, one in found.items() if one is not None and one.cluster == "slurm"}
    states = job_states(jobs.values())
    return {folder: job for folder, job in jobs.items() if states[job].state not in (*ENDED, UNKNOWN)}


def _check_data(run: RunConfig) -> None:
    from ...transfer.data.datasets import check_dataset

    if not run.data.download:
        check_dataset(run.data)
