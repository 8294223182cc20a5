"""Describe a run on a cluster: by the newest of its jobs, or by an earlier one that still runs or waits."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...checkpoints.files import is_folder, near_path
from ...models.errors import CheckpointError, ConfigError, GraftError
from ..progress import Progress, read_progress
from ..say import hint
from ..sweep import load_sweep
from .failures import SILENT, blame, blame_start
from .folder import NOTHING, Attempt, Failure, Job, JobFolder, write_number
from .lock import is_alive, is_ordered, is_submitting, watchers
from .scheduler import (
    AT_WORK,
    REMOVED,
    UNKNOWN,
    WAITING,
    NoAnswerError,
    State,
    job_states,
    number_by_name,
    waiting,
)

FULL = 1 << 20
"""Bytes that are less than what a run writes at its end."""
WAITS = ("pending", "requeued")
ENDINGS = {
    "CANCELLED": "cancelled", "TIMEOUT": "timed out", "PREEMPTED": "preempted", "NODE_FAIL": "node failed",
    "COMPLETED": "unknown", "REVOKED": "cancelled",
}  # fmt: skip
UNSTARTED = "its nodes could not start it, as where they do not see its folder"
BY_STOP = "`graftvit jobs stop`"
NO_JOB = "its submission was interrupted, and no job came of it"
UNSURE = "unsure"
"""The mark in the folder of a launch: sbatch was called, and its answer was lost."""
LATE = 300.0
"""Seconds in which such a job may still come into the queue."""


@dataclass(frozen=True)
class Status:
    """The present state of a job of a run, as a user sees it; of the job that is shown also that of the run."""

    run: Path
    job: Job
    slurm: State
    """What Slurm reports."""
    state: str = ""
    """pending, requeued, running, stopping, finished, stopped, failed, preempted, node failed, timed out,
    cancelled or unknown."""
    why: str = ""
    last: Attempt | None = None
    """Its last attempt that wrote files."""
    found: Failure = NOTHING
    """Why the last attempt ended, if it failed."""
    stopping: bool = False
    """Whether it was asked to stop."""
    problem: str = ""
    """Why the scheduler could not be asked; all else is then what the files say."""
    restarts: int = 0
    """How often the run was started again: by Slurm's count where that is more than what was recorded."""
    history: Sequence[Attempt] = ()
    """The restarts that were recorded; `before` is the reason of each."""
    progress: Progress = field(default_factory=Progress)
    others: Sequence[str] = ()
    """Further jobs of the folder that wait or run."""

    @property
    def active(self) -> bool:
        """Return whether it waits, runs, or will be started again."""
        return self.state in (*WAITS, "running", "stopping")

    @property
    def over(self) -> bool:
        """Return whether it certainly no longer waits or runs."""
        return not self.active and not (self.problem and self.state == "unknown")

    @property
    def words(self) -> str:
        """Return its name for a sentence."""
        return f"job {self.job.job_id}" if self.job.job_id else "a job that is being submitted"

    @property
    def now(self) -> Attempt | None:
        """Return the attempt that the scheduler reports; None if that has written nothing (yet)."""
        return self.last if self.last is not None and self.last.restart >= self.slurm.restarts else None

    @property
    def nodes(self) -> list[str]:
        """Return where it runs, or ran last."""
        return list(self.slurm.nodes) or (self.last.nodes if self.last and self.state not in WAITS else [])

    @property
    def starts(self) -> float | None:
        """When a waiting job is expected to start, Unix time."""
        return self.slurm.start if self.state in WAITS else None

    @property
    def ends(self) -> float | None:
        """When the limit ends a running job, Unix time."""
        return self.slurm.end if self.state == "running" else None

    @property
    def error(self) -> Failure:
        """How the blamed rank failed, or what the scheduler wrote about it; nothing without a failure."""
        return self.found if self.state in ("failed", "unknown", "node failed") else NOTHING


def run_folders(folder: Path) -> list[Path]:
    """Return the run itself, or the submitted cells of a sweep or comparison, the run of its teacher first.

    Raises ConfigError: nothing was submitted to the folder; CheckpointError: the record of its job is damaged.
    """
    folder = folder.absolute()
    if not is_folder(folder):
        near = near_path(folder, folders=True) or "give the output_dir of a run"
        raise ConfigError(f"{folder} is no folder: {near}")
    sweep = load_sweep(folder)
    cells = list(sweep.cells) if sweep else sorted((folder / "cells").glob("*"))
    if cells and not sweep:
        cells = [folder, folder / "teacher", *cells]
    found = [cell for cell in cells if JobFolder(cell).jobs()] or [folder]
    if JobFolder(found[0]).jobs() or JobFolder(found[0]).job():  # which raises for a damaged record
        return found
    raise ConfigError(
        f"{folder} was never submitted: `{hint('submit', 'CONFIG', '--output_dir', folder)}` does that"
    )


def home(run: Path) -> Path:
    """Return the folder that a run is submitted to: the folder of its sweep or comparison, or its own."""
    above = run.parent.parent if run.parent.name == "cells" else run.parent if run.name == "teacher" else run
    return above if (above / "jobs").is_dir() or (above / "sweep.json").exists() else run


def describe_runs(folders: Iterable[Path], **asking: Any) -> list[Status]:
    """Describe several runs, with one question to the scheduler. Raises ConfigError: one was never submitted."""
    judged = judge_jobs(folders, **asking)
    return [_described(jobs) if jobs else _interrupted(run) for run, jobs in judged.items()]


def _interrupted(run: Path) -> Status:
    """Return the status of a run whose submissions were all interrupted before they became a job."""
    jobs = JobFolder(run).jobs()
    if not jobs:
        raise ConfigError(f"{run} was never submitted: `graftvit submit` does that")
    return Status(run, jobs[-1], State(), "cancelled", NO_JOB)


def judge_jobs(runs: Iterable[Path], *, strict: bool = False, **asking: Any) -> dict[Path, list[Status]]:
    """Return all jobs that each run ever had, the oldest first.

    Where the scheduler does not answer, judge by the files, or if `strict` raise NoAnswerError.
    """
    problem, found, states = "", dict[Path, list[Job]](), dict[str, State]()
    for run in runs:
        try:
            found[run] = [one for job in JobFolder(run).jobs() if (one := _numbered(job, run)) is not None]
        except GraftError as error:  # records without a number, and nobody to ask
            found[run], problem = JobFolder(run).jobs(), str(error)
    wanted = [one.job_id for jobs in found.values() for one in jobs if one.cluster == "slurm" and one.job_id]
    try:
        states = {} if problem else job_states(wanted, **asking)
    except GraftError as error:
        problem = str(error)
    if problem and strict:
        raise NoAnswerError(problem)
    return {
        run: [_judged(run, one, states.get(one.job_id, State()), problem) for one in jobs]
        for run, jobs in found.items()
    }


def active_jobs(runs: Iterable[Path]) -> list[Status]:
    """Return the jobs that wait or run. Raises NoAnswerError."""
    return [one for jobs in judge_jobs(runs, strict=True).values() for one in jobs if one.active]


def shown_job(folder: Path) -> Job | None:
    """Return the job that describes a run: the newest, or the newest active one if that one has ended."""
    jobs = JobFolder(folder).jobs()
    if len(jobs) > 1:  # only then the scheduler has to be asked
        jobs = [_shown(judged).job for judged in judge_jobs([folder], tries=1).values() if judged]
    return jobs[0] if jobs else None


def _shown(jobs: Sequence[Status]) -> Status:
    return next((one for one in reversed(jobs) if one.active), jobs[-1])


def _numbered(job: Job, run: Path) -> Job | None:
    """Return a job whose number may not have been written, with it; without one while it is being submitted.

    None: it was interrupted before it became one. Raises GraftError: nobody can be asked.
    """
    if job.job_id:
        return job
    launch = Path(job.launch)
    if job.cluster == "slurm":
        number = number_by_name(job.name, launch / "submit.sh")
    else:
        number = next(iter(watchers(job.logs)), "")
    if number:
        with contextlib.suppress(CheckpointError):  # another user's run
            write_number(launch, number)
        return replace(job, job_id=number if job.index is None else f"{number}_{job.index}")
    under_way = is_submitting(home(run)) or is_ordered(launch / "submit.sh")
    may_come = (launch / UNSURE).exists() and time.time() - job.submitted < LATE
    return job if under_way or may_come else None


def _judged(run: Path, job: Job, slurm: State, problem: str) -> Status:
    files = JobFolder(run)
    attempts = [attempt for attempt in files.attempts() if attempt.job_id == job.job_id]
    last = attempts[-1] if attempts else None
    if job.cluster != "slurm":
        problem = ""
        slurm = State("RUNNING", restarts=last.restart if last else 0) if is_alive(job) else State()
    elif slurm.state == REMOVED:
        slurm = State("CANCELLED") if last is None else State()
    elif not _is_its_own(job, slurm):
        slurm = State()
    if not job.job_id and not problem:
        return Status(run, job, slurm, "pending", "is being submitted")
    if slurm == State() and not problem and (owner := _other_owner(files)):
        problem = f"Slurm shows nothing of this job of {owner}"
    seen = Status(run, job, slurm, last=last, stopping=files.asked_to_stop(job.job_id), problem=problem)
    seen = replace(seen, found=_blame(files, seen))
    state, why = judge(seen)
    if why == SILENT and shutil.disk_usage(run).free < FULL:  # it could not record how it ended
        why = f"{SILENT}; the file system of {run} is full"
    return replace(seen, state=state, why=why)


def _is_its_own(job: Job, slurm: State) -> bool:
    """Return whether the job of this number is the submitted one: numbers repeat on two clusters, or after a reset."""
    by_script = slurm.script is not None and slurm.script.parent == Path(job.launch)
    return not job.name or slurm.name in ("", job.name) or by_script


def _other_owner(files: JobFolder) -> str:
    """Return whose run it is, if another user's, whose jobs a cluster may hide; else nothing."""
    try:
        return files.folder.owner() if files.folder.stat().st_uid != os.getuid() != 0 else ""
    except (OSError, KeyError):
        return "another user"


def _blame(files: JobFolder, seen: Status) -> Failure:
    """Return why the job, or its last attempt, ended; nothing where it waits, runs or ended well."""
    now, ended = seen.now, seen.slurm.state not in (*WAITING, *AT_WORK)
    if now is None:
        return blame_start(seen.job, first=seen.last is None) if ended else NOTHING
    failed = now.outcome == "failed" or (ended and now.outcome is None)
    return blame(files, now, seen.job) if failed and seen.slurm.state not in WAITING else NOTHING


# Judge a job in plain words.


def judge(seen: Status) -> tuple[str, str]:
    """Return the state in plain words, and why."""
    slurm, last = seen.slurm, seen.last
    if slurm.state in WAITING:
        again = slurm.restarts > 0 or last is not None
        return ("requeued" if again else "pending"), waiting(slurm.reason, seen.job.resources, slurm.start)
    if slurm.state in AT_WORK:
        return _at_work(seen)
    if last is not None and last.outcome == "finished":
        return "finished", ""
    return _by_files(seen) if slurm.state == UNKNOWN else _ended(seen)


def _at_work(seen: Status) -> tuple[str, str]:
    """Judge a job that holds nodes."""
    now, word = seen.now, seen.slurm.state.lower()
    held = "" if word in ("running", "completing") else word
    if now is None and word == "completing" and seen.last is not None:  # of the attempt before
        return "requeued", seen.last.signal or seen.last.why or word
    if now is None:
        return ("stopping", held) if seen.stopping else ("running", held or "starting")
    if now.outcome == "requeued":
        return "requeued", now.signal
    if now.outcome is not None:  # its nodes are not free yet, and its other ranks may hang: it can be stopped
        return "stopping", ": ".join(filter(None, [now.outcome, seen.found.why or now.why]))
    if now.signal or seen.stopping or word == "completing":
        return "stopping", now.signal or held
    return "running", held


def _ended(seen: Status) -> tuple[str, str]:
    """Judge a job that the scheduler reports as ended, and that did not finish."""
    slurm, now, found = seen.slurm, seen.now, seen.found
    signal, noted, outcome = ("", "", None) if now is None else (now.signal, now.why, now.outcome)
    by_stop = BY_STOP if seen.stopping else ""
    if outcome == "stopped" and slurm.state != "CANCELLED":
        return "stopped", by_stop or signal
    state = ENDINGS.get(slurm.state, "failed")
    if state not in ("failed", "unknown"):
        said = found.why if found.state == state else ""
        return state, (by_stop if state == "cancelled" else "") or signal or said or slurm.reason
    if found.state or outcome == "failed":
        return found.state or "failed", fuller(found.why, noted)
    if state == "unknown":
        return state, SILENT
    if not found.why and (slurm.reason == "JobLaunchFailure" or slurm.exit_code == "0:53"):
        return state, f"{UNSTARTED}: {slurm.reason or slurm.exit_code}"
    named = "" if slurm.state == "FAILED" else slurm.state.lower().replace("_", " ")
    words = [named, found.why or slurm.reason, exit_words(slurm.exit_code)]
    return state, ", ".join(filter(None, words)) or SILENT


def fuller(found: str, noted: str) -> str:
    """Return what was found, or the attempt's own note if that says more, for example that it was restarted."""
    return noted if not found or found in noted else found


def exit_words(code: str) -> str:
    """`status:signal` as `exit code 1` or `killed by signal 9`."""
    status, _, signal = code.partition(":")
    if signal not in ("", "0"):
        return f"killed by signal {signal}"
    return "" if status in ("", "0") else f"exit code {status}"


def _by_files(seen: Status) -> tuple[str, str]:
    """Judge a job that only its files describe."""
    last, found = seen.last, seen.found
    if last is not None and last.outcome in ("finished", "stopped", "failed"):
        if last.outcome == "failed" and found.why:
            return found.state or "failed", fuller(found.why, last.why)
        return last.outcome, last.why or last.signal
    if seen.problem:
        begun = "no attempt has begun" if last is None else f"attempt {last.number} has not said how it ended"
        return "unknown", f"{seen.problem.partition(':')[0]}; {begun}"
    if seen.stopping and (last is None or last.outcome is None):
        return "cancelled", BY_STOP
    if last is None:
        return "unknown", found.why or "it never began, and the scheduler no longer knows it"
    if last.outcome == "requeued":
        return "unknown", f"was to be requeued after {last.signal or 'a signal'}, and did not begin again"
    return (found.state, found.why) if found.state else ("unknown", last.signal or SILENT)


_HISTORY = {
    "NODE_FAIL": "node failure", "OUT_OF_MEMORY": "out of memory", "PREEMPTED": "preempted", "TIMEOUT": "time limit",
}  # fmt: skip


def _why_again(before: Attempt, attempt: Attempt, history: Sequence[str], found: Failure) -> str:
    """Return why there was another attempt: Slurm's word comes first, then what the attempt itself wrote."""
    same_job = before.job_id == attempt.job_id
    known = history[before.restart] if same_job and before.restart < len(history) else ""
    said = "" if before.retried and known not in ("NODE_FAIL", "OUT_OF_MEMORY") else _HISTORY.get(known, "")
    return (
        attempt.before
        or (fuller(found.why, before.why) if found.state else "")
        or (before.signal if said and said in before.signal else said)
        or (before.why if before.retried else "")
        or before.signal
        or (found.why or before.why if before.outcome == "failed" else "")
        or before.outcome
        or SILENT
    )


def _described(jobs: Sequence[Status]) -> Status:
    """Return the job that describes the run, and what is known of the run."""
    shown = _shown(jobs)
    attempts, last = JobFolder(shown.run).attempts(), shown.last
    # one that neither starts nor is suspended
    since = last.started if last is not None and shown.state == "running" and not shown.why else None
    earlier = len([attempt for attempt in attempts if attempt.job_id != shown.job.job_id])
    return replace(
        shown,
        restarts=max(0, len(attempts) - 1, earlier + shown.slurm.restarts),
        history=_restarts(attempts, shown, {one.job.job_id: one for one in jobs}),
        progress=read_progress(shown.run, training_since=since),
        others=[one.job.job_id for one in jobs if one.active and one is not shown],
    )


def _restarts(attempts: Sequence[Attempt], shown: Status, jobs: Mapping[str, Status]) -> list[Attempt]:
    """Return each attempt but the first, and in `before` why there had to be another."""
    made, files = [], JobFolder(shown.run)
    for place, (before, attempt) in enumerate(itertools.pairwise(attempts), start=1):
        later = (one.log_start for one in attempts[place:] if one.job_id == before.job_id)
        job, found = jobs.get(before.job_id), NOTHING
        if job is not None and before.outcome != "finished":
            found = blame(files, before, job.job, next(later, None))
        asked = job is not None and job.stopping and before.outcome in (None, "stopped")
        why = (
            BY_STOP
            if asked and before.job_id != attempt.job_id
            else _why_again(before, attempt, shown.slurm.history, found)
        )
        made.append(replace(attempt, before=why))
    return made
