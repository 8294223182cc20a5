"""Stop runs early: after a save, or at once."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ...checkpoints.files import is_folder
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
        left = [(run, one) for run, one in _active(runs) if one.submission.job_id not in told]
        cancelled = _cancel_together(left, now)
        for run, one in left:
            job = one.submission.job_id
            try:
                _request(run, one)
                made.done.append(_stop(run, one, now, job in cancelled))
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


def _request(run: Path, one: JudgedJob) -> None:
    """Write the request to stop, before any signal: an attempt that is asked to save looks for it afterwards."""
    if not one.submission.job_id:
        raise ConfigError("it has no number yet; stop it again in a moment")
    if not is_folder(run):  # it could neither read the request nor save
        return
    files = JobFolder(run)
    request = files.stop_request(one.submission.job_id)
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        request.touch()
    except OSError as error:
        raise ConfigError(f"{request} cannot be written ({error.strerror}){_owner(run)}") from error


def _waits(one: JudgedJob) -> bool:
    """Return whether the job holds no node, or is suspended: it receives no signal."""
    return one.job.state == "SUSPENDED" or one.state in ("pending", "requeued")


def _cancel_together(jobs: list[tuple[Path, JudgedJob]], now: bool) -> set[str]:
    """Cancel what does not have to save, in one call; return the numbers.

    Jobs that wait come first: else each node that another one leaves is given to one of them. Where one cannot be
    cancelled, none is returned, and each is asked alone what the matter is.
    """
    ids = []
    for run, one in sorted(jobs, key=lambda pair: not _waits(pair[1])):
        if one.submission.cluster == "slurm" and (now or _waits(one) or not is_folder(run)):
            with suppress(GraftError):  # said where it is stopped alone
                _request(run, one)
                ids.append(one.submission.job_id)
    try:
        if ids:
            cancel(*ids)
    except GraftError:
        return set()
    return set(ids)


def _stop(run: Path, one: JudgedJob, now: bool, cancelled: bool) -> str:
    """Stop a job that was not `cancelled` with others, and return what was done."""
    submission = one.submission
    is_run = not submission.command or submission.command[0] not in SUBMITTED
    ends = "saves at its next step and ends" if is_run else "ends"
    job, go_on = (
        f"{one.words} of {run}",
        f"`{resumes(run)}` {'resumes it' if is_run else 'starts it again'}",
    )
    gone = not is_folder(run)
    if submission.cluster != "slurm":
        stop_process(submission, now=now or gone)
        if gone:
            return f"{job} was {one.state} and is cancelled; {GONE}"
        return f"{job} is cancelled; {go_on}" if now else f"{job} {ends}; {go_on}"
    if now or gone or _waits(one):
        if not cancelled:
            cancel(submission.job_id)
        state = "suspended" if one.job.state == "SUSPENDED" else one.state
        return f"{job} was {state} and is cancelled; {GONE if gone else go_on}"
    try:
        signal_job(submission.job_id, "USR2")
    except NoSuchJobError:  # it is already ending; its next attempt, if there is one, reads the request
        raise
    except GraftError:
        # no signal makes the job look: it is not stopping
        JobFolder(run).stop_request(submission.job_id).unlink(missing_ok=True)
        raise
    return f"{job} {ends}; {go_on}"


def _owner(run: Path) -> str:
    try:
        return f": it is the run of {run.owner()}"
    except (OSError, KeyError):
        return ""
