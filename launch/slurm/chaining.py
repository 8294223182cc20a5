"""Implement `--after RUN`: start a job when other runs have finished well, and cancel it if one of them does not.

A restarted job keeps its number, so `afterok` waits through all its restarts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...models.errors import ConfigError
from ..hints import hint
from .job_folder import JobFolder
from .jobs import judge_jobs, run_folders


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
                f"`{hint('resume', folder)}` submits it again"
            )
    return found
