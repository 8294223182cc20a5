"""What of a folder is not finished, and submitting it again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import ConfigError
from .checks import check_commands, check_folder, check_resources
from .files import JobFolder, Submission
from .settings import ClusterConfig
from .submission import active_jobs, start
from .submit import Launch, Request
from .sweep import load_sweep


@dataclass(frozen=True)
class Unfinished:
    """Runs of `folder` that neither finished nor have a job."""

    folder: Path
    submissions: dict[Path, Submission]
    """Run folder -> how it was submitted."""
    first: Request | None = None
    """The teacher of a comparison, which has to be made before."""

    @property
    def resources(self) -> dict[str, Any]:
        """What was asked of the cluster; a job that was waited for then may be forgotten by now."""
        asked = next(iter(self.submissions.values())).resources
        return {name: value for name, value in asked.items() if name != "dependency"}


def find_unfinished(folder: Path) -> Unfinished:
    """The run, or the cells of a sweep or comparison.

    Raises ConfigError: nothing was submitted to `folder`, all has finished, or a job is at work on what has not.
    """
    folder = folder.absolute()
    sweep = load_sweep(folder)
    if sweep is not None:
        runs = [cell.folder for cell in sweep.cells]
    elif (folder / "cells").is_dir():
        runs = sorted(path.parent.parent for path in folder.glob("cells/*/jobs/submission.json"))
    else:
        runs = [folder]
    submissions = {run: JobFolder(run).submission() for run in runs}
    known = {run: submission for run, submission in submissions.items() if submission is not None}
    if not known:
        raise ConfigError(f"{folder} was never submitted: `graftvit submit` does that")
    left = {run: submission for run, submission in known.items() if not _finished(run)}
    if not left:
        raise ConfigError(f"{folder} has finished: there is nothing to resume")
    active = active_jobs(left)
    free = {run: submission for run, submission in left.items() if run not in active}
    if not free:
        job = next(iter(active.values())).partition("_")[0]
        raise ConfigError(f"{folder} is job {job} already: `graftvit jobs {folder}` shows it")
    return Unfinished(folder, free, _teacher(folder) if runs != [folder] else None)


def resume(unfinished: Unfinished, config: ClusterConfig, *, unchecked: bool = False) -> str:
    """Submits again, and says which jobs these are. Raises ConfigError as `graftvit submit`."""
    first = next(iter(unfinished.submissions.values()))
    directory = Path(first.directory)
    if directory.is_dir():
        os.chdir(directory)  # relative paths of the run are meant from there
    cores = config.cpus_per_task or first.cpus_per_task
    if config.cluster == "slurm" and not unchecked:
        check_commands()
        check_folder(unfinished.folder, config)
        check_resources(config, cores)
    requests = [Request(submission.command, run) for run, submission in unfinished.submissions.items()]
    launch = Launch(f"graftvit-{unfinished.folder.name}", unfinished.folder, requests, config, cores)
    return start(launch, unfinished.first, unchecked=unchecked)


def _teacher(folder: Path) -> Request | None:
    submission = JobFolder(folder / "teacher").submission()
    if submission is None or _finished(folder / "teacher"):
        return None
    return Request(submission.command, folder / "teacher")


def _finished(run: Path) -> bool:
    attempts = JobFolder(run).attempts()
    return bool(attempts) and attempts[-1].outcome == "finished"
