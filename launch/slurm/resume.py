"""Find unfinished runs in a folder and submit them again."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import ConfigError
from ..hints import hint
from ..load_config import load_config
from ..say import say_aside
from .batch import Launch, Request, job_name
from .checks import check_commands, check_folder, check_resources
from .job_folder import JobFolder, Submission, resumes
from .jobs import judge_jobs, run_folders
from .lock import submitting
from .lookup import home
from .run_progress import current_stage
from .settings import ClusterConfig
from .submission import refuse_active, start
from .submit import test_only

PATIENCE, EVERY = 600.0, 2.0
"""How many seconds `graftvit resume` waits for a job that is stopping, and between two checks."""


@dataclass(frozen=True)
class Unfinished:
    """Runs of `folder` that neither finished nor have a job."""

    folder: Path
    submissions: dict[Path, Submission]
    """Run folder -> how it was submitted."""
    first: Request | None = None
    """The teacher of a comparison, which has to be trained first."""

    @property
    def resources(self) -> dict[str, Any]:
        """The resources of the earlier submission; Slurm may have forgotten a job that it waited for."""
        asked = next(iter(self.submissions.values())).resources
        kept = {name: value for name, value in asked.items() if name != "dependency"}
        options = {
            name: value for name, value in kept.get("sbatch", {}).items() if name != "kill_on_invalid_dep"
        }
        return {**kept, "sbatch": options} if "sbatch" in kept else kept


def find_unfinished(folder: Path) -> Unfinished:
    """Return the unfinished run, or the unfinished cells of a sweep or comparison.

    Raises ConfigError: nothing was submitted to `folder`, all has finished, or a job is at work on what has not.
    """
    folder = folder.absolute()
    submissions = {run: JobFolder(run).submission() for run in run_folders(folder)}
    lost = [run for run, submission in submissions.items() if submission is None]
    refuse_active(lost, folder)
    known = {run: submission for run, submission in submissions.items() if submission is not None}
    teacher = known.pop(folder / "teacher", None)
    if not known and teacher is not None:
        raise ConfigError(f"the cells of {folder} were never submitted: `graftvit submit` does that")
    if not known:
        raise ConfigError(
            f"{folder} has no record of how it was submitted: `{resumes(folder)}`, with the flags that it needs, "
            "resumes from what it has saved"
        )
    left = {run: submission for run, submission in known.items() if not JobFolder(run).finished}
    if not left:
        raise ConfigError(f"{folder} has finished: there is nothing to resume")
    jobs = judge_jobs(left, strict=True)
    active = {run: one for run, judged in jobs.items() for one in judged if one.active}
    free = {run: submission for run, submission in left.items() if run not in active}
    if not free:
        words = next(iter(active.values())).words.partition("_")[0]
        raise ConfigError(f"{folder} is {words} already: `{hint('jobs', folder)}` shows it")
    if teacher is None or JobFolder(folder / "teacher").finished:
        return Unfinished(folder, free)
    refuse_active([folder / "teacher"], folder)
    return Unfinished(folder, free, Request(teacher.command, folder / "teacher"))


def wait_for_stops(folder: Path, patience: float = PATIENCE) -> None:
    """Wait until jobs that are stopping have ended; after `patience` seconds they count as running."""
    until, told = time.monotonic() + patience, False
    while time.monotonic() < until:
        judged = judge_jobs(run_folders(folder), strict=True)
        ending = [
            one.words
            for run, jobs in judged.items()
            for one in jobs
            if one.state == "stopping" and JobFolder(run).asked_to_stop(one.submission.job_id)
        ]
        if not ending:
            return
        if not told:
            say_aside(f"graftvit: waiting for {ending[0]}, which was told to stop, to end\n")
        told = True
        time.sleep(EVERY)


def resume(unfinished: Unfinished, config: ClusterConfig, *, unchecked: bool = False) -> str:
    """Submit again, and say which jobs these are. Raises ConfigError as `graftvit submit`."""
    waits = ""
    if not unchecked:
        waits = check_again(unfinished, config)
        plan_again(unfinished, config)
    with submitting(home(unfinished.folder)):
        left = find_unfinished(unfinished.folder)  # another shell may have been quicker
        return start(launch_again(left, config), left.first, waits)


def go_back(unfinished: Unfinished) -> None:
    """Change to where the runs were submitted from: their relative paths are meant from there.

    Raises ConfigError: it is not there.
    """
    directory = Path(next(iter(unfinished.submissions.values())).directory)
    if not directory.is_dir():
        raise ConfigError(
            f"{unfinished.folder} was submitted from {directory}, which is not there any more, and relative paths in "
            f"its settings are meant from there: `{shlex.join(['mkdir', '-p', str(directory)])}`, with what they name"
        )
    os.chdir(directory)


def launch_again(unfinished: Unfinished, config: ClusterConfig) -> Launch:
    """Return the runs with their resources, from the folder that they were submitted from."""
    go_back(unfinished)
    first = next(iter(unfinished.submissions.values()))
    requests = [Request(submission.command, run) for run, submission in unfinished.submissions.items()]
    cores = config.cpus_per_task or first.cpus_per_task
    return Launch(job_name(unfinished.folder), unfinished.folder, requests, config, cores)


def check_again(unfinished: Unfinished, config: ClusterConfig) -> str:
    """Return what the job has to wait for, if anything. Raises ConfigError for what the cluster cannot give."""
    if config.cluster != "slurm":
        return ""
    check_commands()
    check_folder(unfinished.folder, config)
    launch = launch_again(unfinished, config)
    check_resources(config, launch.cpus_per_task)
    return test_only(launch)


def plan_again(unfinished: Unfinished, config: ClusterConfig) -> str:
    """Return the plan of the first started run, which describes all cells: they use the same number of processes.

    Raises ConfigError: so many processes cannot share its step, or the folder that it was submitted from is gone.
    """
    go_back(unfinished)
    stages = (current_stage(run) for run in unfinished.submissions)
    begun = next((stage for stage in stages if (stage / "config.yaml").is_file()), None)
    if begun is None:
        return ""
    say_aside("graftvit: checking whether the run can go on: its teacher, data and plan ...\n")
    from ..plan_text import describe_plan

    return describe_plan(load_config(begun), config.world_size)
