"""Submit runs, from the checks to the job numbers.

For a folder that already holds a run, print what the run resumes from and which settings change, without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ...checkpoints.files import read_regular
from ...models.errors import ConfigError, DataError, GraftError, counted
from ...transfer.config import RunConfig
from ...transfer.engine.resume_check import changes, describe_changes, differences, settings
from ..load_config import load_config
from ..say import hint, say_aside
from .batch import Launch, Request, job_name, new_identity
from .checks import check_commands, check_folder, check_resources
from .job_folder import JobFolder, newest_state, remember
from .jobs import current_stage, judge_jobs, read_progress, run_folders
from .lock import submitting
from .lookup import home
from .requests import SubmissionPlan
from .scheduler import NoAnswerError
from .settings import ClusterConfig
from .submit import submit, test_only
from .sweep import check_sweep

# Implement `--after RUN`: start a job when other runs have finished well, and cancel it if one of them does not.
#
# A restarted job keeps its number, so `afterok` waits through all its restarts.


def dependency_on(folders: Sequence[Path], *more: str) -> dict[str, Any]:
    """Return the resources of a job that waits for these runs and sweeps; no dependency if all have finished.

    Args:
        folders: Folders of runs or sweeps.
        more: Other dependencies, in sbatch's words.

    Raises:
        ConfigError: one of them can no longer finish, or was never submitted.
    """
    jobs = [job for folder in folders for job in jobs_before(folder)]
    if not jobs:
        return {}
    waits = ",".join([*more, f"afterok:{':'.join(dict.fromkeys(jobs))}"])
    return {"dependency": waits, "sbatch": {"kill_on_invalid_dep": "yes"}}


def jobs_before(folder: Path) -> list[str]:
    """Return the unfinished jobs of a run, or of the cells of a sweep. Raises ConfigError."""
    found: list[str] = []
    for run, judged in judge_jobs(run_folders(folder), strict=True).items():
        active = [one for one in judged if one.active]
        for one in active:
            if one.submission.cluster != "slurm" or not one.submission.job_id:
                raise ConfigError(f"--after {folder}: {run} is {one.words}, which Slurm cannot wait for")
        found += [one.submission.job_id for one in active]
        if not active and not JobFolder(run).finished:
            raise ConfigError(
                f"--after {folder}: {run} has neither finished nor a job that could: `{hint('jobs', run)}` tells why, "
                f"`{hint('jobs', 'resume', folder)}` submits it again"
            )
    return found


def check(plan: SubmissionPlan, config: ClusterConfig, *, unchecked: bool = False) -> str:
    """Return what the job has to wait for, if anything.

    Raises ConfigError, DataError or another GraftError for what cannot run as it is asked for.
    """
    waits = check_cluster(plan, config, unchecked=unchecked)
    if not unchecked:
        check_runs(plan, config)
    return waits


def check_early(config: ClusterConfig) -> None:
    """Raise ConfigError for what the cluster cannot give, as far as that is known before the plan is."""
    if config.cluster == "slurm":
        check_commands()
        check_resources(config, config.cpus_per_task or 1)


def check_cluster(plan: SubmissionPlan, config: ClusterConfig, *, unchecked: bool = False) -> str:
    """Run the quick part of `check`, which needs no torch."""
    _check_machine(plan, config)
    if plan.comparison:
        _check_comparison(plan, config)
    if config.cluster == "slurm":
        check_commands()
    _refuse_second(plan, config)
    if not unchecked:
        refuse_finished(plan)
    if unchecked or config.cluster != "slurm":
        return ""
    check_folder(plan.folder, config)
    check_resources(config, cores(plan.configs, config))
    return test_only(launch_of(plan, config))


def check_runs(plan: SubmissionPlan, config: ClusterConfig) -> list[str]:
    """Run the slow part of `check`: return the plan of each run in words."""
    if not plan.configs:
        return []
    say_aside("graftvit: checking the run: its settings, teacher, data and plan ...\n")
    from ..plan_text import describe_plan

    plans = []
    for run in plan.configs:
        _check_data(run, config)
        plans.append(describe_plan(run, config.world_size, needs_data=not run.data.download))
    for warning in dict.fromkeys(
        line.partition("warning: ")[2] for text in plans for line in text.splitlines()
    ):
        if warning:
            say_aside(f"graftvit: warning: {warning}\n")
    return plans


def send(plan: SubmissionPlan, config: ClusterConfig, waits: str = "") -> str:
    """Submit what has to wait for `waits`, and say which jobs these are and what to do next."""
    launch = launch_of(plan, config)
    with submitting(home(plan.folder)):
        _refuse_second(plan, config)
        if plan.sweep is not None:
            check_sweep(plan.sweep)
        if words := describe_again(plan, config):
            say_aside(f"graftvit: {words}\n")
        plan.write()
        said = start(launch, plan.first, waits)
    if plan.comparison:
        frozen = next(iter(plan.frozen))
        said += f"  {hint('compare', frozen, '--report')}    # when all cells are through\n"
    return said


def start(launch: Launch, first: Request | None = None, waits: str = "") -> str:
    """Submit `launch`, after a job for `first` where it is given, and say which jobs these are.

    The caller keeps others out (`submitting`), and has seen that none of the runs has a job.
    """
    remember(launch.folder)  # before: an interrupted submission may have made a job
    slurm = launch.config.cluster == "slurm"
    after = ""
    if first is not None:
        made = submit(replace(launch, requests=[first], identity=new_identity()))[0]
        launch = replace(launch, after=made if slurm else None)
        after = f", after job {made} for the teacher,"
    try:
        jobs = submit(launch)
    except GraftError as error:
        if not after:
            raise
        raise type(error)(f"{error}; job {made} for the teacher was submitted, and continues") from error
    cells = len(jobs) > 1 or launch.folder != launch.requests[0].output_dir
    count = f" ({counted(len(jobs), 'cell')})" if cells else ""
    return (
        f"submitted job {jobs[0].partition('_')[0]}{count}{after} in {launch.folder}\n"
        f"  {hint('jobs', launch.folder)}\n  {hint('jobs', 'logs', launch.requests[0].output_dir, '--follow')}\n"
        + (f"  {waits}\n" if waits else "")
    )


def cores(configs: Sequence[RunConfig], config: ClusterConfig) -> int:
    """Return the cores of a process: the loader's, and one for the run."""
    return config.cpus_per_task or 1 + max((run.data.workers for run in configs), default=0)


def launch_of(plan: SubmissionPlan, config: ClusterConfig) -> Launch:
    """Return the runs of `plan` with their resources."""
    return Launch(job_name(plan.folder), plan.folder, plan.requests, config, cores(plan.configs, config))


def _check_machine(plan: SubmissionPlan, config: ClusterConfig) -> None:
    """Raise ConfigError where more is asked for than one machine or process is."""
    if config.cluster != "slurm" and config.nodes > 1:
        raise ConfigError(
            f"{config.said('nodes')}: --cluster {config.cluster} is this machine alone; give --nodes 1"
        )
    if config.cluster == "debug" and config.tasks > 1:
        raise ConfigError(
            f"--cluster debug is this process alone, and {config.tasks} are asked for: give one GPU or task"
        )
    if config.cluster == "local" and len(plan.requests) > config.array_parallelism:
        raise ConfigError(
            f"{config.said('array_parallelism')}: --cluster local starts all {len(plan.requests)} cells at once: "
            "allow more of them, or take fewer values"
        )


def _check_comparison(plan: SubmissionPlan, config: ClusterConfig) -> None:
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


def _refuse_inner(folder: Path) -> None:
    """Raise ConfigError for a place that a run, a sweep or a comparison keeps for its own cells and teacher."""
    above = folder.parent.parent if folder.parent.name == "cells" else folder.parent
    ours = (above / "jobs").is_dir() or (above / "sweep.json").exists()
    if ours and (folder.parent.name == "cells" or folder.name == "teacher"):
        raise ConfigError(
            f"--output_dir {folder} is inside of {above}, which was submitted as a whole: give another folder, or "
            f"`{hint('jobs', 'resume', above)}`"
        )


def _refuse_second(plan: SubmissionPlan, config: ClusterConfig) -> None:
    """Raise ConfigError where one of the runs, or what was submitted to the same folder before, has a job."""
    _refuse_inner(plan.folder)
    first = [] if plan.first is None else [plan.first]
    own = [request.output_dir for request in [*first, *plan.requests]]
    there = [] if plan.folder in own else [plan.folder]
    try:
        refuse_active([*there, *own], plan.folder)
    except NoAnswerError:
        if config.cluster == "slurm":
            raise
        refuse_active([*there, *own], plan.folder, by_name=False)  # checks without Slurm do not wait for it


def refuse_active(runs: Iterable[Path], shown: Path, *, by_name: bool = True) -> None:
    """Raise ConfigError where one of these runs has a job; NoAnswerError where Slurm has to be asked and is silent."""
    for run, jobs in judge_jobs(runs, strict=True, by_name=by_name).items():
        for one in jobs:
            if one.active:
                raise ConfigError(
                    f"{run} is {one.words} already: `{hint('jobs', shown)}` shows it, "
                    f"`{hint('jobs', 'stop', shown)}` ends it"
                )


def _check_data(run: RunConfig, config: ClusterConfig) -> None:
    from ...transfer.data.datasets import check_dataset

    if run.data.download:
        return
    try:
        check_dataset(run.data)
    except DataError as error:
        if config.cluster != "slurm":
            raise
        raise DataError(f"{error}; where data are on the nodes alone, `--unchecked` does not look") from error


OF_ONE_JOB = ("dependency", "profile", "shared_folders", "sbatch.kill_on_invalid_dep")
"""Resources whose change changes nothing in the run."""


def describe_again(plan: SubmissionPlan, config: ClusterConfig) -> str:
    """Return one line; empty if all runs are new, or each job starts from the beginning anyway."""
    if not plan.configs or plan.comparison:
        return ""
    if plan.sweep is not None:
        return _describe_cells(plan)
    run = plan.configs[0]
    stage = current_stage(plan.folder)
    if not (stage / "config.yaml").is_file():
        return ""
    changed = _changed_settings(stage, plan) | _changed_resources(plan.folder, config)
    return f"{_place(stage, run)}; {describe_changes(changed) or 'nothing changed'}"


def refuse_finished(plan: SubmissionPlan) -> None:
    """Raise ConfigError if a single run has nothing left to train."""
    single = len(plan.configs) == 1 and not plan.comparison and plan.sweep is None
    if single and JobFolder(plan.folder).finished and _has_finished(plan.folder, plan.configs[0]):
        raise ConfigError(
            f"{plan.folder} has finished: there is nothing left to train; give more --epochs or another --output_dir, "
            "or --unchecked, which submits it all the same"
        )


def _has_finished(folder: Path, run: RunConfig) -> bool:
    done, limit = read_progress(folder), run.optim.max_steps
    return run.output_dir == folder and (done.step >= limit if limit else done.epoch >= run.optim.epochs)


def _describe_cells(plan: SubmissionPlan) -> str:
    begun = sum(1 for request in plan.requests if newest_state(request.output_dir))
    verb = "resumes from what it has" if begun == 1 else "resume from what they have"
    return f"{begun} of {len(plan.requests)} cells {verb} saved" if begun else ""


def _place(stage: Path, run: RunConfig) -> str:
    """Return where the run resumes."""
    if not newest_state(stage):
        return "starts again, because nothing was saved"
    done, limit = read_progress(stage), run.optim.max_steps
    if stage != run.output_dir:
        return f"resumes in stage {stage.name} at epoch {done.epoch + 1}"
    if _has_finished(stage, run):
        return "has finished: nothing is left to train"
    return f"resumes at epoch {done.epoch + 1} of {f'a run of {limit} steps' if limit else run.optim.epochs}"


def _changed_settings(stage: Path, plan: SubmissionPlan) -> dict[str, tuple[object, object]]:
    """Return the settings of the earlier run; of stages, whose student comes from the stage before, as submitted."""
    run = plan.configs[0]
    if stage != run.output_dir:
        path, text = next(iter(plan.frozen.items()))
        try:
            return differences(_by_stage(read_regular(path)), _by_stage(text))
        except (
            GraftError,
            yaml.YAMLError,
            KeyError,
            TypeError,
            RecursionError,
        ):  # it was removed, or had no stages
            return {}
    try:
        before = load_config(stage)
    except GraftError:  # of another version
        return {}
    return changes({"config": settings(before), "origins": {}}, run)


def _by_stage(frozen: str) -> dict[str, object]:
    """Name -> settings."""
    return {stage["name"]: stage for stage in yaml.safe_load(frozen)["stages"]}


def _changed_resources(folder: Path, config: ClusterConfig) -> dict[str, tuple[object, object]]:
    submission = JobFolder(folder).submission()
    if submission is None:
        return {}
    now = {
        name: value for name, value in config.model_dump(mode="json").items() if name in submission.resources
    }
    found = differences(submission.resources, now)
    return {key: values for key, values in found.items() if key not in OF_ONE_JOB}
