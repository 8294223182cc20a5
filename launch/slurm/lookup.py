"""Find the jobs of a run: from its records, and by job names if records are missing.

A record is written before the job is submitted, and its number after. If the submission is killed in between, or
somebody removes `jobs/` or the run folder, the run still has a job: Slurm knows it by its name, and this machine's
processes are known by the folder of their run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from ...checkpoints.files import read_json
from ...models.errors import GraftError
from .batch import job_name
from .job_folder import Cluster, JobFolder, Submission, job_id
from .lock import FILE as LOCK
from .lock import is_submitting
from .scheduler import ENDED, NoAnswerError, ask
from .settings import ClusterConfig

_COLUMNS = ("JobArrayID", "State", "SubmitTime", "Name", "Command")
UNSURE = "unsure"
"""The mark in the folder of a launch: sbatch was called, and its answer was lost."""
LATE = 300.0
"""Seconds in which such a job may still come into the queue."""


@dataclass(frozen=True)
class NamedJob:
    """A job, or a cell of an array, as Slurm knows it."""

    job_id: str
    name: str
    script: Path
    """`LAUNCH/submit.sh`, which tells what was submitted."""
    submitted: float
    state: str = "RUNNING"
    """Slurm's word."""

    @property
    def index(self) -> int | None:
        """Its place in the array."""
        _, _, place = self.job_id.partition("_")
        return int(place) if place.isdigit() else None


def find_submissions(runs: Iterable[Path], *, by_name: bool = True) -> dict[Path, list[Submission]]:
    """Return all submissions of each run, the oldest first, with the numbers of their jobs.

    Submissions that were interrupted before the scheduler knew them are left out; a submission that another command
    is making now has no number.

    Args:
        runs: Run folders, submitted or not.
        by_name: Also ask Slurm for jobs of runs that have lost their records.

    Raises:
        GraftError: if Slurm has to be asked, and does not answer.
    """
    found = {run: JobFolder(run).submissions() for run in runs}
    whole = all(one.job_id for known in found.values() for one in known) and all(found.values())
    here = {} if whole else controllers()
    for run, known in found.items():
        found[run] = known or _on_this_machine(run, here)
    lost = [run for run, known in found.items() if not known] if by_name else []
    named = _queued(found, lost, by_name)
    for run, known in found.items():
        numbered = [one for one in (_with_number(one, run, named, here) for one in known) if one is not None]
        found[run] = numbered + _without_record(run, named, numbered)
    return found


def home(run: Path) -> Path:
    """Return the folder that a run is submitted to: the folder of its sweep or comparison, or its own."""
    above = run.parent.parent if run.parent.name == "cells" else run.parent if run.name == "teacher" else run
    return above if (above / "jobs").is_dir() or (above / "sweep.json").exists() else run


def number_by_name(launch: Path) -> str:
    """Return the job number of `launch`; empty without one. Raises GraftError: Slurm does not answer."""
    jobs = [job for job in queued_jobs() if job.script.parent == launch]
    return jobs[0].job_id.partition("_")[0] if jobs else ""


def write_number(launch: Path, number: str) -> None:
    """Record the job number of a launch."""
    temporary = launch / ".job"
    temporary.write_text(f"{number}\n", encoding="ascii")
    temporary.replace(launch / "job")


def queued_jobs() -> list[NamedJob]:
    """Return all jobs of this user that Slurm knows. Raises GraftError."""
    columns = ",".join(f"{name}:|" for name in _COLUMNS)
    text = ask("squeue", "--me", "--states=all", "--array", "--noheader", f"--Format={columns}")
    last = len(_COLUMNS) - 1  # the path of the script, which may contain the separator
    rows = [line.split("|", last) for line in text.splitlines() if line.count("|") > last]
    return [
        NamedJob(
            job, name, Path(script.removesuffix("|")), datetime.fromisoformat(submitted).timestamp(), state
        )
        for job, state, submitted, name, script in ([value.strip() for value in row] for row in rows)
    ]


def _queued(
    found: Mapping[Path, Sequence[Submission]], lost: Sequence[Path], by_name: bool
) -> list[NamedJob]:
    """Return the jobs of this user, if one of them may belong to these runs."""
    ours = [one for known in found.values() for one in known if one.cluster == "slurm"]
    if not all(one.job_id for one in ours):
        return queued_jobs()
    if not by_name:
        return []
    if shutil.which("squeue") is None:
        return []
    if any((home(run) / LOCK).exists() for run in lost):
        return queued_jobs()
    if not lost and not ours:
        return []
    try:
        return queued_jobs()  # records may be gone, damaged, or those of an older copy of the folder
    except NoAnswerError:
        if lost:
            raise
        return []  # the caller asks for the states of these jobs and gets the same error
    except GraftError:  # the commands are installed, but no cluster is configured
        return []


def _with_number(
    one: Submission, run: Path, named: Sequence[NamedJob], here: Mapping[Path, list[int]]
) -> Submission | None:
    """Return the submission with its number; None if it never became a job."""
    if one.job_id:
        return one
    launch = Path(one.launch)
    numbers = (
        [str(pid) for pid in here.get(Path(one.logs), [])]
        if one.cluster == "local"
        else [job.job_id.partition("_")[0] for job in named if job.script.parent == launch]
    )
    if numbers:
        with contextlib.suppress(OSError):  # another user's run
            write_number(launch, numbers[0])
        return replace(one, job_id=numbers[0] if one.index is None else f"{numbers[0]}_{one.index}")
    found = job_id(launch, one.index)  # the job may have started by now, and have recorded it
    if found:
        return replace(one, job_id=found)
    under_way = is_submitting(home(run)) or is_ordered(launch / "submit.sh")
    may_come = (launch / UNSURE).exists() and time.time() - one.submitted < LATE
    return one if under_way or may_come else None


def _without_record(run: Path, named: Sequence[NamedJob], recorded: Sequence[Submission]) -> list[Submission]:
    """Return the jobs of a run that have no record, as after `rm -r jobs`; no ended ones if others have records."""
    top, known = home(run), {one.job_id for one in recorded}
    jobs = [job for job in named if job.name == job_name(top) and (top == run or _run_of(job) == run)]
    jobs = [job for job in jobs if job.job_id not in known and (not recorded or job.state not in ENDED)]
    return [_bare(job.job_id, "slurm", top, submitted=job.submitted, name=job.name) for job in jobs]


def _on_this_machine(run: Path, here: Mapping[Path, list[int]]) -> list[Submission]:
    """Do the same without Slurm."""
    return [_bare(str(pid), "local", run) for pid in here.get(run / "jobs" / "logs", [])]


def _bare(number: str, cluster: Cluster, folder: Path, **known: Any) -> Submission:
    """Return what is known about a job whose record was removed."""
    logs, resources = str(folder / "jobs" / "logs"), ClusterConfig(cluster=cluster).model_dump(mode="json")
    values = {"submitted": 0.0, "command": [], "logs": logs, "resources": resources, "code": "", **known}
    return Submission(job_id=number, cluster=cluster, **values)


def _run_of(job: NamedJob) -> Path | None:
    """Return the run of a cell of an array, from the record of its launch."""
    try:
        runs = read_json(job.script.parent / "runs.json")
        return Path(runs[job.index or 0])
    except (GraftError, TypeError, LookupError):
        return None


CONTROLLER = "submitit.local._local"
SLACK = 2.0
"""Seconds by which the system's time of a process's start may be late."""


def is_alive(submission: Submission) -> bool:
    """Return whether the process of a `local` or `debug` job runs on this machine."""
    if submission.cluster == "debug":
        elsewhere = submission.pid in (0, os.getpid()) or submission.host != socket.gethostname()
        return not elsewhere and _is_older(submission.pid, submission.submitted)
    try:
        words = psutil.Process(int(submission.job_id)).cmdline()
    except (ValueError, psutil.Error):
        return False
    return " ".join(words).endswith(
        f"{CONTROLLER} {submission.logs}"
    )  # else another process has the number by now


def controllers() -> dict[Path, list[int]]:
    """Return, for each log folder, the ids of the processes that watch its jobs: submitit's, or the shell before it."""
    found: dict[Path, dict[int, int]] = {}
    for process in _processes():
        _, is_one, logs = _line(process).partition(f"{CONTROLLER} ")
        if is_one:
            found.setdefault(Path(logs), {})[process.pid] = process.info["ppid"]
    return {logs: [pid for pid, parent in pids.items() if parent not in pids] for logs, pids in found.items()}


def is_ordered(script: Path) -> bool:
    """Return whether an sbatch with this script still runs, for example after the command that started it ended."""
    return any(_line(process).endswith(f" {script}") for process in _processes())


def stop_process(submission: Submission, *, now: bool = False) -> None:
    """Tell a `local` or `debug` job to save and end, or to end. Raises GraftError: it is another user's."""
    pid = submission.pid if submission.cluster == "debug" else _innermost(submission)
    # submitit's controller passes SIGTERM on to its tasks, and kills them on SIGINT; it does not know SIGUSR2
    try:
        os.kill(pid, signal.SIGINT if now else signal.SIGTERM)
    except ProcessLookupError:  # it has just ended
        return
    except OSError as error:
        raise GraftError(f"process {pid} cannot be signalled: {error.strerror}") from error


def _innermost(submission: Submission) -> int:
    """submitit's controller, which is a child of the job's process where setup lines need a shell."""
    job = int(submission.job_id)
    try:
        children = psutil.Process(job).children()
        return next((one.pid for one in children if CONTROLLER in one.cmdline()), job)
    except psutil.Error:
        return job


def _processes() -> Iterator[psutil.Process]:
    return iter(psutil.process_iter(["ppid", "cmdline"]))


def _line(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ())  # a zombie has none


def _is_older(pid: int, moment: float) -> bool:
    """Return whether the process existed at that moment, and is not a later one with the same number."""
    try:
        return pid > 0 and psutil.Process(pid).create_time() <= moment + SLACK
    except psutil.Error:
        return False
