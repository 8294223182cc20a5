"""Which jobs a run has: by its records, and by the jobs' names where these do not tell.

A record is written before the scheduler is told of the job, and its number after. A submission that was killed in
between, or a run whose `jobs/` was removed, has a job all the same: Slurm knows it by its name, and a process of this
machine by its folder.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from .batch import job_name
from .files import JobFolder, Submission, job_id
from .lock import is_submitting
from .processes import controllers, is_ordered
from .scheduler import _ask

_COLUMNS = ("JobArrayID", "SubmitTime", "Name", "Command")


@dataclass(frozen=True)
class NamedJob:
    """A job, or a cell of an array, as Slurm knows it."""

    job_id: str
    name: str
    script: Path
    """`LAUNCH/submit.sh`, which tells what was submitted."""
    submitted: float

    @property
    def index(self) -> int | None:
        """Its place in the array."""
        _, _, place = self.job_id.partition("_")
        return int(place) if place.isdigit() else None


def find_submissions(runs: Iterable[Path]) -> dict[Path, list[Submission]]:
    """All submissions of each run, the oldest first, with the numbers of their jobs.

    What was interrupted before the scheduler knew of it is left out; what another command submits at this moment has
    no number. A run without records may have jobs: the names tell.

    Raises GraftError: Slurm has to be asked, and does not answer.
    """
    found = {run: JobFolder(run).submissions() for run in runs}
    unsure = [run for run, known in found.items() if not all(one.job_id for one in known) or not known]
    named = _named_jobs(unsure, found) if unsure else []
    for run in unsure:
        known = [_with_number(one, run, named) for one in found[run]]
        found[run] = [one for one in known if one is not None] if known else _without_records(run, named)
    return found


def home(run: Path) -> Path:
    """The folder that a run is submitted to: that of its sweep or comparison, or its own."""
    above = run.parent.parent if run.parent.name == "cells" else run.parent if run.name == "teacher" else run
    return above if (above / "jobs").is_dir() or (above / "sweep.json").exists() else run


def number_by_name(launch: Path) -> str:
    """The number of what was submitted with `launch`, or nothing. Raises GraftError: Slurm does not answer."""
    jobs = [job for job in queued_jobs() if job.script.parent == launch]
    return jobs[0].job_id.partition("_")[0] if jobs else ""


def write_number(launch: Path, number: str) -> None:
    """Writes down which job the scheduler has made of it."""
    temporary = launch / ".job"
    temporary.write_text(f"{number}\n", encoding="ascii")
    temporary.replace(launch / "job")


def queued_jobs() -> list[NamedJob]:
    """All jobs of this user that Slurm knows. Raises GraftError."""
    columns = ",".join(f"{name}:|" for name in _COLUMNS)
    text = _ask(["squeue", "--me", "--states=all", "--array", "--noheader", f"--Format={columns}"])
    rows = [[value.strip() for value in line.split("|")] for line in text.splitlines()]
    return [
        NamedJob(row[0], row[2], Path(row[3]), datetime.fromisoformat(row[1]).timestamp())
        for row in rows
        if len(row) > len(_COLUMNS)
    ]


def _named_jobs(unsure: Sequence[Path], found: dict[Path, list[Submission]]) -> list[NamedJob]:
    """None where there is no Slurm, and nothing was submitted to it."""
    ordered = any(one.cluster == "slurm" and not one.job_id for run in unsure for one in found[run])
    there = any(run.is_dir() for run in unsure) and shutil.which("squeue") is not None
    return queued_jobs() if ordered or there else []


def _with_number(one: Submission, run: Path, named: Sequence[NamedJob]) -> Submission | None:
    """None where it never came to a job."""
    if one.job_id:
        return one
    launch = Path(one.launch)
    numbers = (
        [str(pid) for pid in controllers(Path(one.logs))]
        if one.cluster == "local"
        else [job.job_id.partition("_")[0] for job in named if job.script.parent == launch]
    )
    if numbers:
        with contextlib.suppress(OSError):  # another user's run
            write_number(launch, numbers[0])
        return replace(one, job_id=numbers[0] if one.index is None else f"{numbers[0]}_{one.index}")
    found = job_id(launch, one.index)  # the job may have begun by now, and have written it down
    if found:
        return replace(one, job_id=found)
    return one if is_submitting(home(run)) or is_ordered(launch / "submit.sh") else None


def _without_records(run: Path, named: Sequence[NamedJob]) -> list[Submission]:
    """Jobs of a run whose `jobs/` was removed."""
    top = home(run)
    logs = top / "jobs" / "logs"
    jobs = [job for job in named if job.name == job_name(top) and (top == run or _run_of(job) == run)]
    queued = [
        Submission(job.job_id, "slurm", job.submitted, [], str(logs), {}, "", name=job.name, index=job.index)
        for job in jobs
    ]
    here = [
        Submission(str(pid), "local", 0.0, [], str(run / "jobs" / "logs"), {}, "")
        for pid in controllers(run / "jobs" / "logs")
    ]
    return queued + here


def _run_of(job: NamedJob) -> Path | None:
    """The run of a cell of an array, as its launch says."""
    try:
        runs = json.loads((job.script.parent / "runs.json").read_text(encoding="utf-8"))
        return Path(runs[job.index or 0])
    except (OSError, ValueError, IndexError):
        return None
