"""Stop runs early: after a save, or at once. Wait for those that are stopping."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from ...models.errors import ConfigError, GraftError
from ..say import hint, say_aside
from .folder import JobFolder
from .jobs import WAITS, Status, active_jobs, home, run_folders
from .lock import stop_process, submitting
from .scheduler import NoSuchJobError, cancel, signal_job

PATIENCE, EVERY = 600.0, 2.0
"""How many seconds `graftvit jobs resume` waits for a job that is stopping, and between two checks."""


def wait_for_stops(folder: Path, patience: float = PATIENCE) -> None:
    """Wait until jobs that are stopping have ended; after `patience` seconds they count as running."""
    until, told = time.monotonic() + patience, ""
    while time.monotonic() < until:
        active = active_jobs(run_folders(folder))
        ending = next((one.words for one in active if one.state == "stopping" and one.stopping), "")
        if not ending:
            return
        if not told:
            say_aside(f"graftvit: waiting for {ending}, which was told to stop, to end\n")
        told = ending
        time.sleep(EVERY)


ROUNDS = 3
"""How often a request to a job is repeated: it may have started, ended or been requeued in that moment."""
PAUSE = 0.5
"""Seconds between two rounds."""


def stop(folder: Path, *, now: bool = False) -> tuple[list[str], list[str]]:
    """Stop all jobs of a run or sweep, `now` or after a save; one that cannot be stopped keeps no other from it.

    Returns a sentence for each job that was asked to end, and for each that continues. Raises ConfigError: nothing was
    submitted to the folder; GraftError: Slurm does not answer.
    """
    runs = run_folders(folder)
    for top in dict.fromkeys(home(one.run) for one in active_jobs(runs) if not one.job.job_id):
        with submitting(top):  # until a submission at this moment is through, whose job has no number yet
            pass
    told, done, failed, ending = set[str](), list[str](), list[str](), list[str]()
    for place in range(ROUNDS):
        time.sleep(PAUSE if place else 0)
        failed, ending = [], []
        left = [one for one in active_jobs(runs) if one.job.job_id not in told]
        cancelled = _cancel_together(left, now)
        for one in left:
            try:
                _request(one)
                done.append(_stop(one, now, one.job.job_id in cancelled))
                told.add(one.job.job_id)
            except NoSuchJobError:  # where it is started again after all, it finds the request
                ending.append(f"{one.words} of {one.run} is ending already")
            except GraftError as error:
                failed.append(f"{one.words} of {one.run} continues: {error}")
        if not failed + ending:
            break
    return done + ending, failed


def _request(one: Status) -> None:
    """Write the request to stop, before any signal: an attempt that is asked to save looks for it afterwards."""
    if not one.job.job_id:
        raise ConfigError("it has no number yet; stop it again in a moment")
    request = JobFolder(one.run).stop_request(one.job.job_id)
    try:
        request.touch()
    except OSError as error:
        raise ConfigError(f"{request} cannot be written ({error.strerror})") from error


def _waits(one: Status) -> bool:
    """Return whether the job holds no node, or is suspended: it receives no signal."""
    return one.slurm.state == "SUSPENDED" or one.state in WAITS


def _cancel_together(jobs: list[Status], now: bool) -> set[str]:
    """Cancel what does not have to save, in one call; return the numbers.

    Jobs that wait come first: else each node that another one leaves is given to one of them. Where one cannot be
    cancelled, none is returned, and each is asked alone what the matter is.
    """
    ids = []
    for one in sorted(jobs, key=lambda one: not _waits(one)):
        if one.job.cluster == "slurm" and (now or _waits(one)):
            with suppress(GraftError):  # said where it is stopped alone
                _request(one)
                ids.append(one.job.job_id)
    try:
        if ids:
            cancel(*ids)
    except GraftError:
        return set()
    return set(ids)


def _stop(one: Status, now: bool, cancelled: bool) -> str:
    """Stop a job that was not `cancelled` with others, and return what was done."""
    job, words = one.job, f"{one.words} of {one.run}"
    ends = "saves at its next step and ends" if job.is_run else "ends"
    go_on = f"`{hint('jobs', 'resume', one.run)}` {'resumes it' if job.is_run else 'starts it again'}"
    if job.cluster != "slurm":
        stop_process(job, now=now)
        return f"{words} {'is cancelled' if now else ends}; {go_on}"
    if now or _waits(one):
        if not cancelled:
            cancel(job.job_id)
        state = "suspended" if one.slurm.state == "SUSPENDED" else one.state
        return f"{words} was {state} and is cancelled; {go_on}"
    try:
        signal_job(job.job_id, "USR2")
    except GraftError as error:
        # of a job that is ending already, the next attempt, if there is one, reads the request
        if not isinstance(error, NoSuchJobError):  # else no signal makes the job look: it is not stopping
            JobFolder(one.run).stop_request(job.job_id).unlink(missing_ok=True)
        raise
    return f"{words} {ends}; {go_on}"
