"""Remove runs from the list of `graftvit jobs`; their folders stay as they are."""

from __future__ import annotations

from pathlib import Path

from ...models.errors import ConfigError
from ..say import hint
from .job_folder import forget, known, listed, plain
from .jobs import JudgedJob, judge_jobs, run_folders


def forget_run(folder: Path) -> None:
    """Take a run out of the list.

    Raises ConfigError: the run is not in the list, or has a job; GraftError: Slurm does not answer.
    """
    folder = plain(folder)
    if folder not in listed():
        raise ConfigError(f"{folder} is not in the list of runs: `graftvit jobs` shows it")
    active = _active(folder)
    if active:
        raise ConfigError(
            f"{folder} is {active[0].words}, and stays in the list: `{hint('jobs', 'stop', folder)}` ends it"
        )
    forget(folder)


def forget_ended() -> list[Path]:
    """Forget all runs that are there and have no job, and return them. Raises GraftError: Slurm does not answer."""
    ended = [folder for folder in known() if not _active(folder)]
    for folder in ended:
        forget(folder)
    return ended


def _active(folder: Path) -> list[JudgedJob]:
    try:
        runs = run_folders(folder)
    except ConfigError:  # removed or replaced by now; its job may still run
        runs = [folder]
    return [one for jobs in judge_jobs(runs, strict=True).values() for one in jobs if one.active]
