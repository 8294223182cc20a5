"""Plan a submission: one run, the cells of a sweep, the cells of a comparison, another command, or any of them again.

Each configuration is frozen as YAML before it is submitted.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoints.files import read_regular
from ...models.errors import ConfigError
from ...models.plain_yaml import write_yaml
from ...transfer.config import RunConfig
from ..cli import DISTRIBUTED
from ..load_config import FOR_THE_TEACHER, Setting, dump_config, load_comparison, load_config, read_recipe
from ..progress import current_stage
from ..say import hint, say_aside
from ..submitted import SUBMITTED, Work, check_words, command_name
from ..sweep import cell_configs, cell_settings, check_sweep, frozen_text, parse_sweep, run_configs
from .attempt import Task
from .batch import Batch
from .folder import ORDER_FILE, Job, JobFolder
from .jobs import active_jobs, judge_jobs, run_folders
from .request import Request

if TYPE_CHECKING:
    from ...transfer.analysis.compare.comparison_cells import Comparison

GOES_ON = Setting("engine.resume", "auto", "graftvit submit")
"""The resume policy of a job: its restarts resume; `never` was checked before the submission."""


def plan_run(
    recipe: str | None,
    settings: Sequence[Setting],
    sweep: Sequence[str],
    request: Request,
) -> Batch:
    """Return what `graftvit submit RECIPE SETTINGS --sweep ...` submits; check every cell, write nothing.

    Raises ConfigError: something in the recipe, the settings or the sweep is not valid.
    """
    source = None if recipe is None else read_recipe(recipe)
    if source is not None and source.compare is not None:
        if sweep:
            raise ConfigError(
                f"--sweep does not go with {recipe}, which compares plans: its cells are the sweep"
            )
        say_aside("graftvit: checking the cells of the comparison ...\n")
        return _plan_comparison(str(recipe), settings, request)
    folder = run_configs(recipe, settings)[0].output_dir.absolute()
    settings = [*settings, _absolute(folder)]
    if sweep:
        return _plan_sweep(recipe, settings, sweep, request)
    configs = run_configs(recipe, settings)
    for config in configs:
        _refuse_existing(config)
    frozen = folder / "jobs" / "config.yaml"
    texts = {frozen: frozen_text(recipe, [*settings, GOES_ON])}
    return _batch(folder, [Task(["train", str(frozen)], folder)], request, configs[:1], frozen=texts)


def _batch(
    folder: Path, tasks: Sequence[Task], request: Request, configs: Sequence[RunConfig], **more: Any
) -> Batch:
    """Return the tasks with the cores of a process: the loader's, and one for the run."""
    cores = request.cpus_per_task or 1 + max((run.data.workers for run in configs), default=0)
    return Batch(folder, tasks, request, cores, configs=configs, **more)


def _plan_sweep(
    recipe: str | None, settings: Sequence[Setting], words: Sequence[str], request: Request
) -> Batch:
    folder = run_configs(recipe, settings)[0].output_dir
    sweep = parse_sweep(words, folder)
    check_sweep(sweep)
    plain = [setting for setting in settings if setting.key != "output_dir"]
    for cell in sweep.cells:
        _refuse_existing(run_configs(recipe, [*settings, _absolute(cell)])[0])
    frozen, tasks = {}, []
    for cell, text in cell_configs(sweep, recipe, [*plain, GOES_ON]).items():
        path = cell / "jobs" / "config.yaml"
        frozen[path] = text
        known = path.is_file() and read_regular(path, errors="replace") == text
        if not (known and JobFolder(cell).finished):
            tasks.append(Task(["train", str(path)], cell))
    if not tasks:
        raise ConfigError(
            f"all {len(sweep.cells)} cells of {folder} have finished: `{hint('jobs', 'summary', folder)}`"
        )
    first = run_configs(recipe, cell_settings(sweep, next(iter(sweep.cells)), settings))[:1]
    return _batch(folder, tasks, request, first, frozen=frozen, sweep=sweep)


def _refuse_existing(config: RunConfig) -> None:
    """Raise ConfigError as `refuse_existing`."""
    from ...transfer.engine.resume_check import refuse_existing

    refuse_existing(config.output_dir, config.engine.resume)


def _plan_comparison(recipe: str, settings: Sequence[Setting], request: Request) -> Batch:
    """Return a task for each cell; every cell must be possible."""
    from ...transfer.analysis.compare.compare import check_cells

    settings = [*settings, _absolute(load_comparison(recipe, settings).folder)]
    comparison = load_comparison(recipe, settings)
    check_cells(comparison, comparison.cells())
    path = comparison.folder / "jobs" / "config.yaml"
    words = ["compare", str(path)]
    for setting in settings:
        if setting.key in FOR_THE_TEACHER:  # its run takes these over, too
            value = setting.value if isinstance(setting.value, str) else json.dumps(setting.value)
            words.append(f"--{setting.key}={value}")
    tasks = [
        Task([*words, "--cell", cell.folder], comparison.cell_folder(cell)) for cell in comparison.cells()
    ]
    first, config = None, comparison.config
    made = comparison.teacher
    if made is not None and not (made.output_dir / "student" / "config.json").exists():
        first, config = Task([*words, "--only", "teacher"], made.output_dir), made
    frozen = {path: _frozen_comparison(comparison, recipe)} | _frozen_teacher(comparison, path)
    return _batch(comparison.folder, tasks, request, [config], frozen=frozen, first=first, comparison=True)


def _absolute(folder: Path) -> Setting:
    return Setting("output_dir", str(folder.absolute()), "--output_dir")


def _frozen_comparison(comparison: Comparison, recipe: str) -> str:
    stages = []
    for stage in comparison.stages:
        values = stage.config.model_dump(mode="json")
        if comparison.teacher is not None:
            values["teacher"].pop("source")  # trained in the folder of the comparison
        stages.append({"name": stage.name, **values})
    return write_yaml({"compare": read_recipe(recipe).compare, "stages": stages})


def _frozen_teacher(comparison: Comparison, beside: Path) -> dict[Path, str]:
    """Return the recipe of the teacher if it is a user's file: under its name, beside the frozen comparison."""
    name = comparison.compare.teacher_recipe
    if comparison.teacher is None or name is None or Path(name).suffix not in (".yaml", ".yml"):
        return {}
    path = beside.parent / name
    inside = path.resolve().is_relative_to(beside.parent.resolve()) and path != beside
    return {path: dump_config(comparison.teacher)} if inside else {}


def plan_work(
    words: Sequence[str], folder: Path | None, request: Request, *, shares: int = 1, unchecked: bool = False
) -> Batch:
    """Return what `graftvit submit COMMAND ...` submits. Write nothing.

    Raises GraftError: the command would refuse its words, it is one process and several are asked for, or it cannot be
    divided.
    """
    command, *rest = words
    if command not in DISTRIBUTED and request.world_size > 1:
        raise ConfigError(
            f"`graftvit {command_name(words)}` is one process, and {request.nodes} x {request.tasks} are asked for: "
            "give --nodes 1 and --tasks_per_node 1, or --gpus_per_node 1"
        )
    say_aside(f"graftvit: checking the words of `graftvit {command_name(words)}` ...\n")
    work = check_words(command, rest, here=not unchecked)
    folder = (folder or _usual_folder(words)).absolute()
    job = JobFolder(folder).job()
    if (folder / "config.yaml").exists() or (job is not None and job.command[0] not in SUBMITTED):
        raise ConfigError(f"--job_dir {folder} holds a run, with jobs of its own: give another folder")
    order = {"words": list(words), "output": None if work.output is None else str(work.output.absolute())}
    text = json.dumps(order) + "\n"
    tasks = _divided(Task(list(words), folder), shares, work)
    frozen = {one.output_dir / "jobs" / ORDER_FILE: text for one in tasks}
    return Batch(folder, tasks, request, request.cpus_per_task or 1 + work.workers, frozen)


def _divided(task: Task, shares: int, work: Work) -> list[Task]:
    """Return a task for each share. Raises ConfigError: the command cannot be divided."""
    if shares == 1:
        return [task]
    if shares < 1 or not work.divisible:
        raise ConfigError(
            f"--shares {shares}: only `programs search` and `hybrid` can be divided, into 1 or more"
        )
    cells = task.output_dir / "cells"
    return [
        Task([*task.words, "--share", f"{one}/{shares}"], cells / f"share-{one}")
        for one in range(1, shares + 1)
    ]


def describe_work(batch: Batch) -> str:
    """Return the command, the folder of its log and jobs, and what it writes."""
    order = json.loads(next(iter(batch.frozen.values())))
    output = f"writes {order['output']}\n" if order["output"] else ""
    return f"{shlex.join(['graftvit', *order['words']])}\n{output}jobs and log in {batch.folder}\n\n"


def _usual_folder(words: Sequence[str]) -> Path:
    """`runs/evaluate-distill` for `evaluate runs/distill`."""
    *_, command = names = command_name(words).split()
    first = next((word for word in words[len(names) :] if not word.startswith("-")), "")
    name = re.sub(r"[^\w.=-]+", "-", Path(first.partition("#")[0]).name).strip("-")
    return Path("runs", "-".join(filter(None, [command, name])))


# Find what is unfinished in a folder, to submit it again.


def unfinished(folder: Path) -> dict[Path, Job]:
    """Run folder -> how it was submitted, of the runs of `folder` that neither finished nor have a job.

    The teacher of a comparison comes first, where it is among them.

    Raises ConfigError: nothing was submitted to `folder`, all has finished, or a job is at work on what has not.
    """
    folder = folder.absolute()
    known = {run: JobFolder(run).job() for run in run_folders(folder)}
    left = {run: job for run, job in known.items() if job is not None and not JobFolder(run).finished}
    if set(known) == {folder / "teacher"}:
        raise ConfigError(f"the cells of {folder} were never submitted: `graftvit submit` does that")
    if not left:
        raise ConfigError(f"{folder} has finished: there is nothing to resume")
    active = active_jobs(left)
    busy = {one.run for one in active}
    if busy == set(left) or folder / "teacher" in busy:
        words = active[0].words
        if active[0].job.cluster == "slurm":  # for a cell, the number of its array
            words = words.partition("_")[0]
        raise ConfigError(f"{folder} is {words} already: `{hint('jobs', folder)}` shows it")
    return {run: job for run, job in left.items() if run not in busy}


def asked_before(jobs: Mapping[Path, Job]) -> dict[str, Any]:
    """Return the resources of the earlier submission; Slurm may have forgotten a job that it waited for."""
    asked = list(jobs.values())[-1].resources
    kept = {name: value for name, value in asked.items() if name != "dependency"}
    options = {name: value for name, value in kept.get("sbatch", {}).items() if name != "kill_on_invalid_dep"}
    return {**kept, "sbatch": options} if "sbatch" in kept else kept


def plan_again(folder: Path, jobs: Mapping[Path, Job], request: Request) -> Batch:
    """Return these unfinished runs of `folder`, from the folder that they were submitted from.

    Raises ConfigError: that is not there.
    """
    folder, newest = folder.absolute(), list(jobs.values())[-1]
    directory = Path(newest.directory)
    if not directory.is_dir():
        raise ConfigError(
            f"{folder} was submitted from {directory}, which is not there any more, and relative paths in its settings "
            f"are meant from there: make it again, with what they name"
        )
    os.chdir(directory)
    teacher = folder / "teacher"
    tasks = [Task(job.command, run) for run, job in jobs.items()]
    first = tasks.pop(0) if teacher in jobs and len(tasks) > 1 else None
    begun = (stage for stage in map(current_stage, jobs) if (stage / "config.yaml").is_file())
    configs = [load_config(stage) for stage in begun][:1]
    cores = request.cpus_per_task or newest.cpus_per_task
    return Batch(folder, tasks, request, cores, first=first, configs=configs, again=True)


def dependency_on(folders: Sequence[Path], other: str | None = None) -> dict[str, Any]:
    """Return the resources of a job that waits for these runs and sweeps, beside what `other` says in sbatch's words.

    Empty if all have finished. A restarted job keeps its number, so `afterok` waits for its last restart.

    Raises ConfigError: one of them can no longer finish, or was never submitted.
    """
    jobs = dict.fromkeys(job for folder in folders for job in jobs_before(folder))
    if not jobs:
        return {}
    waits = ",".join(filter(None, [other, f"afterok:{':'.join(jobs)}"]))
    return {"dependency": waits, "sbatch": {"kill_on_invalid_dep": "yes"}}


def jobs_before(folder: Path) -> list[str]:
    """Return the unfinished jobs of a run, or of the cells of a sweep. Raises ConfigError."""
    found: list[str] = []
    for run, judged in judge_jobs(run_folders(folder), strict=True).items():
        active = [one for one in judged if one.active]
        for one in active:
            if one.job.cluster != "slurm" or not one.job.job_id:
                raise ConfigError(f"--after {folder}: {run} is {one.words}, which Slurm cannot wait for")
        found += [one.job.job_id for one in active]
        if not active and not JobFolder(run).finished:
            raise ConfigError(
                f"--after {folder}: {run} has neither finished nor a job that could: `{hint('jobs', run)}` tells why, "
                f"`{hint('jobs', 'resume', folder)}` submits it again"
            )
    return found
