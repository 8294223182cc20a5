"""Stop runs early: after a save, or at once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from ...checkpoints.paths import is_folder
from ...models.errors import ConfigError, GraftError
from ..submitted import SUBMITTED
from .ask import NoSuchJobError
from .job_folder import JobFolder, resumes
from .jobs import GONE, JudgedJob, judge_jobs, run_folders
from .lock import submitting
from .lookup import home, stop_process
from .scheduler import cancel, signal_job

ROUNDS = 3
"""How often a request to a job is repeated: it may have started, ended or been requeued in that moment."""
PAUSE = 0.5
"""Seconds between two rounds."""


@dataclass
class Stopped:
    """The result of stopping runs."""

    done: list[str] = field(default_factory=list)
    """A sentence for each job that was asked to end."""
    failed: list[str] = field(default_factory=list)
    """A sentence for each job that continues."""


def stop(folder: Path, *, now: bool = False) -> Stopped:
    """Stop all jobs of a run, or of the cells of a sweep; one that cannot be stopped keeps no other from it.

    Args:
        folder: Of the run or the sweep.
        now: Without waiting for a save.

    Raises:
        ConfigError: if nothing was submitted to the folder.
        GraftError: if Slurm does not answer.
    """
    runs = run_folders(folder)
    _wait_for_submissions(runs)
    made, told, ending = Stopped(), set[str](), list[str]()
    for place in range(ROUNDS):
        time.sleep(PAUSE if place else 0)
        made.failed, ending = [], []
        for run, one in _active(runs):
            job = one.submission.job_id
            if job in told:
                continue
            try:
                made.done.append(_stop(run, one, now))
                told.add(job)
            except NoSuchJobError:  # where it is started again after all, it finds the request
                ending.append(f"{one.words} of {run} is ending already")
            except GraftError as error:
                made.failed.append(f"{one.words} of {run} continues: {error}")
        if not made.failed + ending:
            break
    made.done += ending
    return made


def _active(runs: list[Path]) -> list[tuple[Path, JudgedJob]]:
    judged = judge_jobs(runs, strict=True)
    return [(run, one) for run, jobs in judged.items() for one in jobs if one.active]


def _wait_for_submissions(runs: list[Path]) -> None:
    """Until a submission at this very moment is through, whose job has no number yet."""
    for top in dict.fromkeys(home(run) for run, one in _active(runs) if not one.submission.job_id):
        with submitting(top):
            pass


def _stop(run: Path, one: JudgedJob, now: bool) -> str:
    submission = one.submission
    if not submission.job_id:
        raise ConfigError("it has no number yet; stop it again in a moment")
    files = JobFolder(run)
    request = files.stop_request(submission.job_id)
    is_run = not submission.command or submission.command[0] not in SUBMITTED
    ends = "saves at its next step and ends" if is_run else "ends"
    job, go_on = (
        f"{one.words} of {run}",
        f"`{resumes(run)}` {'resumes it' if is_run else 'starts it again'}",
    )
    suspended = one.job.state == "SUSPENDED"  # it receives no signal
    waits = submission.cluster == "slurm" and (suspended or one.state in ("pending", "requeued"))
    if not is_folder(run):  # it could neither read the request nor save
        return _cancel_without_folder(run, one)
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        request.touch()  # first: an attempt that is asked to save looks for it afterwards
    except OSError as error:
        raise ConfigError(f"{request} cannot be written ({error.strerror}){_owner(run)}") from error
    if submission.cluster != "slurm":
        stop_process(submission, now=now)
        return f"{job} is cancelled; {go_on}" if now else f"{job} {ends}; {go_on}"
    if now or waits:
        cancel(submission.job_id)
        return f"{job} was {'suspended' if suspended else one.state} and is cancelled; {go_on}"
    try:
        signal_job(submission.job_id, "USR2")
    except NoSuchJobError:  # it is already ending; its next attempt, if there is one, reads the request
        raise
    except GraftError:
        request.unlink(missing_ok=True)  # no signal makes the job look: it is not stopping
        raise
    return f"{job} {ends}; {go_on}"


def _cancel_without_folder(run: Path, one: JudgedJob) -> str:
    if one.submission.cluster == "slurm":
        cancel(one.submission.job_id)
    else:
        stop_process(one.submission, now=True)
    return f"{one.words} of {run} was {one.state} and is cancelled; {GONE}"


def _owner(run: Path) -> str:
    try:
        return f": it is the run of {run.owner()}"
    except (OSError, KeyError):
        return ""
