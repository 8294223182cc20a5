"""Describe a run on a cluster: by the newest of its jobs, or by an earlier one that still runs or waits."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...checkpoints.files import is_folder, near_path, read_records
from ...models.errors import ConfigError, GraftError
from ..load_config import load_config
from ..say import hint
from ..submitted import SUBMITTED
from .job_folder import Attempt, JobFolder, Submission, forget, is_copied, known, listed, plain, read_order
from .judging import (
    ACTIVE,
    AT_WORK,
    NOTHING,
    SILENT,
    WAITING,
    Blame,
    Evidence,
    Restart,
    blame,
    blame_start,
    judge,
    log_starts,
    restarts_of,
)
from .lookup import find_submissions, is_alive
from .scheduler import TRIES, JobState, NoAnswerError, job_states
from .sweep import load_sweep

# Measure how far a run is, from its log and its configuration alone.

INTERVALS = 5
"""How many of the last records give the speed."""


@dataclass(frozen=True)
class Progress:
    """The progress of the run, or of the current stage of a recipe with stages."""

    stage: str = ""
    step: int = 0
    total_steps: int | None = None
    """None before it can be known: at the end of the first epoch, or at once with `optim.max_steps`."""
    epoch: int = 0
    """Epochs that are behind."""
    epochs: int | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    """The seconds left in this stage: from now if it trains, else from its start."""
    last_top1: float | None = None
    best_top1: float | None = None


def read_progress(folder: Path, training_since: float | None = None) -> Progress:
    """Return the progress according to the files of a run folder; all defaults before the first record.

    Args:
        folder: The run folder.
        training_since: When the present attempt started to train; None if no attempt runs.
    """
    inner = current_stage(folder)
    stage = "" if inner == folder else inner.name
    path = inner / "log.jsonl"
    try:
        records = [record for record in read_records(path) if isinstance(record.get("step"), int)]
        written = path.stat().st_mtime
    except (OSError, GraftError):
        return Progress(stage)
    epochs = [record for record in records if "n_parameters" in record]
    step = max((int(record["step"]) for record in records), default=0)
    limit, total = _length(inner, epochs)
    pace = _seconds_a_step(records, epochs)
    # what the attempt has done since its last record; before its first one it starts, and has done nothing
    age = time.time() - written if training_since is not None and written > training_since else 0.0
    left = None if total is None or pace is None else max(0.0, (total - step) * pace - max(0.0, age))
    speeds = [record["images_per_second"] for record in records if "images_per_second" in record]
    scores = [float(value) for record in epochs if (value := _top1(record)) is not None]
    return Progress(
        stage=stage,
        step=step,
        total_steps=total,
        epoch=int(epochs[-1]["epoch"]) + 1 if epochs else 0,
        epochs=limit,
        images_per_second=float(speeds[-1]) if speeds else None,
        seconds_left=0.0 if total is not None and step >= total else left,
        last_top1=scores[-1] if scores else None,
        best_top1=max(scores, default=None),
    )


def current_stage(folder: Path) -> Path:
    """Return the folder `<i>-<name>` of the last started stage; the run folder itself without stages."""
    stages = [
        (int(found[1]), path)
        for path in folder.glob("*-*")
        if (found := re.match(r"(\d+)-", path.name)) and (path / "config.yaml").is_file()
    ]
    return folder if (folder / "config.yaml").is_file() or not stages else max(stages)[1]


def _length(folder: Path, epochs: list[dict[str, Any]]) -> tuple[int | None, int | None]:
    """Return epochs and steps of the whole run, as far as they can be known."""
    try:
        optim = load_config(folder).optim
    except GraftError:
        return None, None
    if optim.max_steps is not None:
        return None, optim.max_steps
    if not epochs:
        return optim.epochs, None
    before = epochs[-2]["step"] if len(epochs) > 1 else 0
    left = optim.epochs - epochs[-1]["epoch"] - 1
    return optim.epochs, int(epochs[-1]["step"] + left * (epochs[-1]["step"] - before))


def _seconds_a_step(records: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> float | None:
    """Return the speed of the last intervals, or else of the last epoch."""
    intervals = [record for record in records if "n_parameters" not in record and "seconds" in record]
    chosen = intervals or epochs
    before = [0, *(int(record["step"]) for record in chosen)]
    pairs = list(zip(chosen, before, strict=False))[-INTERVALS:]
    timed = [(record, earlier) for record, earlier in pairs if "images_per_second" in record]
    steps = sum(int(record["step"]) - earlier for record, earlier in timed)
    seconds = sum(float(record.get("seconds", 0)) for record, _ in timed)
    return seconds / steps if steps > 0 and seconds > 0 else None


def _top1(record: dict[str, Any]) -> Any:
    return record.get("test_ema_top1", record.get("test_top1"))


FULL = 1 << 20
"""Bytes that are less than what a run writes at its end."""
GONE = "its folder was removed or moved"
Submissions = Mapping[Path, Sequence[Submission]]


@dataclass(frozen=True)
class JudgedJob:
    """One job of a run."""

    submission: Submission
    job: JobState
    state: str
    why: str = ""
    last: Attempt | None = None
    """Its last attempt that wrote files."""
    found: Blame = NOTHING

    @property
    def active(self) -> bool:
        """Return whether it waits, runs, or will be started again."""
        return self.state in ACTIVE

    @property
    def words(self) -> str:
        """Return its name for a sentence."""
        return f"job {self.submission.job_id}" if self.submission.job_id else "a job that is being submitted"


@dataclass(frozen=True)
class RunStatus:
    """The present state of a run."""

    folder: Path
    job_id: str
    cluster: str
    submitted: float
    state: str
    """pending, requeued, running, stopping, finished, stopped, failed, preempted, node failed, timed out,
    cancelled or unknown."""
    why: str = ""
    nodes: list[str] = field(default_factory=list)
    world_size: int | None = None
    restarts: list[Restart] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    starts: float | None = None
    """When a waiting job is expected to start, Unix time."""
    ends: float | None = None
    """When the limit ends a running job, Unix time."""
    error: str = ""
    """How the blamed rank failed, or what the scheduler wrote about it; empty without a failure."""
    error_rank: int | None = None
    others: list[str] = field(default_factory=list)
    """Further jobs of the folder that wait or run."""
    problem: str = ""
    """Why the scheduler could not be asked; all else is then what the files say."""
    command: str = ""
    """The command as it would be typed, if this is not a run."""
    output: str = ""
    """What such a command writes."""

    @property
    def active(self) -> bool:
        """Return whether it waits, runs, or will be started again."""
        return self.state in ACTIVE

    @property
    def over(self) -> bool:
        """Return whether it certainly no longer waits or runs."""
        return not self.active and not (self.problem and self.state == "unknown")


def run_folders(folder: Path) -> list[Path]:
    """Return the run itself, or the submitted cells of a sweep or comparison, the run of its teacher first.

    A folder that is gone is its own run where it has a job that waits or runs.

    Raises ConfigError: nothing was submitted to the folder.
    """
    folder = folder.absolute()
    if not is_folder(folder):
        living, problem = _without_folder([folder])
        if living:
            return living
        near = near_path(folder, folders=True) or "give the output_dir of a run"
        raise ConfigError(f"{folder} is no folder: {near}" + (f"; {problem}" if problem else ""))
    sweep = load_sweep(folder)
    cells = [cell.folder for cell in sweep.cells] if sweep else sorted((folder / "cells").glob("*"))
    if cells and not sweep:
        cells.insert(0, folder / "teacher")
    own = [folder] if cells and not sweep and JobFolder(folder).submissions() else []
    found = own + _submitted(cells) or _submitted([folder])
    if found:
        return found
    raise ConfigError(
        f"{folder} was never submitted: `{hint('submit', 'CONFIG', '--output_dir', folder)}` does that"
    )


def listed_runs() -> list[Path]:
    """Return this user's existing runs, and removed ones that still have a job; the last submitted one at the end."""
    runs = listed()
    living, _ = _without_folder(runs)
    return [run for run in runs if is_folder(run) or run in living]


def _without_folder(runs: Iterable[Path]) -> tuple[list[Path], str]:
    """Return runs whose folder was removed but not their job, and why Slurm could not be asked."""
    judged, problem = _judge([run for run in runs if not is_folder(run)], TRIES)
    return [run for run, jobs in judged.items() if any(one.active for one in jobs)], problem


def _submitted(runs: list[Path]) -> list[Path]:
    """Return runs with a submission, or with a job without one. Raises GraftError if that cannot be found out."""
    submissions, problem = _submissions(runs, by_name=True)
    found = [run for run in runs if submissions[run]]
    if problem and not found:
        raise GraftError(problem)
    return found


def describe_run(folder: Path) -> RunStatus:
    """Describe one run. Raises ConfigError: it was never submitted."""
    return describe_runs([folder])[0]


def describe_runs(folders: Iterable[Path], *, tries: int = TRIES) -> list[RunStatus]:
    """Describe several runs, with one question to the scheduler. Raises ConfigError: one was never submitted."""
    judged, problem = _judge(list(folders), tries)
    for folder, jobs in judged.items():
        if not jobs:
            raise ConfigError(f"{folder} was never submitted: `graftvit submit` does that")
    return [_status(folder, jobs, problem) for folder, jobs in judged.items()]


def judge_jobs(
    runs: Iterable[Path], *, strict: bool = False, by_name: bool = True
) -> dict[Path, list[JudgedJob]]:
    """Return all jobs that each run ever had, the oldest first.

    Args:
        runs: Run folders, submitted or not.
        strict: Raise NoAnswerError where the scheduler does not answer, instead of judging by the files.
        by_name: As in `find_submissions`.
    """
    judged, problem = _judge(list(runs), TRIES, by_name)
    if problem and strict:
        raise NoAnswerError(problem)
    return judged


def shown_job(jobs: Sequence[JudgedJob]) -> JudgedJob:
    """Return the newest job of a run, or the newest active one if that one has ended."""
    return next((one for one in reversed(jobs) if one.active), jobs[-1])


def shown_submission(folder: Path) -> Submission | None:
    """Return the submission of the job that `describe_run` describes; None without a record.

    The scheduler is asked where there are several alone, and but once.
    """
    submissions = JobFolder(folder).submissions()
    if len(submissions) < 2:
        return submissions[0] if submissions else None
    return shown_job(_judge([folder], 1)[0][folder]).submission


def _judge(runs: list[Path], tries: int, by_name: bool = True) -> tuple[dict[Path, list[JudgedJob]], str]:
    """Return all jobs of each run, and why the scheduler could not be asked if it was needed."""
    submissions, problem = _submissions(runs, by_name)
    states: Mapping[str, JobState] = {}
    wanted = [one.job_id for jobs in submissions.values() for one in jobs if one.cluster == "slurm"]
    if not problem:
        try:
            states = job_states(filter(None, wanted), tries=tries)
        except GraftError as error:
            problem = str(error)
    return {run: [_judged(run, one, states, problem) for one in submissions[run]] for run in runs}, problem


def _submissions(runs: list[Path], by_name: bool) -> tuple[Submissions, str]:
    try:
        return find_submissions(runs, by_name=by_name), ""
    except GraftError as error:  # records without a number, and nobody to ask
        return {run: JobFolder(run).submissions() for run in runs}, str(error)


def _judged(run: Path, submission: Submission, states: Mapping[str, JobState], problem: str) -> JudgedJob:
    files = JobFolder(run)
    attempts = [attempt for attempt in files.attempts() if attempt.job_id == submission.job_id]
    last = attempts[-1] if attempts else None
    job = states.get(submission.job_id, JobState())
    if is_copied(submission, run) or not _is_its_own(submission, job):
        job = JobState()
    if submission.cluster != "slurm":
        problem = ""
        job = (
            JobState("RUNNING", restarts=last.restart if last else 0) if is_alive(submission) else JobState()
        )
    elif not submission.job_id and not problem:
        return JudgedJob(submission, job, "pending", "is being submitted")
    elif job == JobState() and not problem and _is_foreign(files):
        problem = "Slurm shows nothing of this job of another user"
    seen = Evidence(run, job, last, files.asked_to_stop(submission.job_id), problem)
    found = _blame(files, submission, seen)
    state, why = judge(Evidence(run, job, last, seen.stopping, problem, found))
    if why == SILENT and _is_full(run):
        why = f"{SILENT}; the file system of {run} is full"
    if not is_folder(run):
        why = "; ".join(filter(None, [why, GONE]))
    return JudgedJob(submission, job, state, why, last, found)


def _is_its_own(submission: Submission, job: JobState) -> bool:
    """Return whether the job of this number is the submitted one: numbers repeat on two clusters, or after a reset."""
    by_script = job.script is not None and job.script.parent == Path(submission.launch)
    return not submission.name or job.name in ("", submission.name) or by_script


def _is_full(folder: Path) -> bool:
    """Return whether a run could not record now how it ended."""
    try:
        return shutil.disk_usage(folder).free < FULL
    except OSError:
        return False


def _is_foreign(files: JobFolder) -> bool:
    """Return whether the run is another user's: a cluster may hide such jobs."""
    return files.folder.exists() and files.folder.stat().st_uid != os.getuid() != 0


def _blame(files: JobFolder, submission: Submission, seen: Evidence) -> Blame:
    """Return why the job, or its last attempt, ended; nothing where it waits, runs or ended well."""
    if seen.job.state in WAITING:
        return NOTHING
    if seen.now is None:
        return NOTHING if seen.job.state in AT_WORK else blame_start(submission, first=seen.last is None)
    if seen.now.outcome == "failed" or (seen.now.outcome is None and seen.job.state not in AT_WORK):
        return blame(files, seen.now, submission)
    return NOTHING


def _status(folder: Path, jobs: Sequence[JudgedJob], problem: str) -> RunStatus:
    shown = shown_job(jobs)
    living = [one for one in jobs if one.active]
    files, job, last, state = JobFolder(folder), shown.job, shown.last, shown.state
    attempts = files.attempts()
    waits = state in ("pending", "requeued")
    trains = state == "running" and not shown.why and last is not None  # neither starts nor is suspended
    wrong = state in ("failed", "unknown", "node failed")
    stopped = {one.submission.job_id for one in jobs if files.asked_to_stop(one.submission.job_id)}
    command = shown.submission.command
    order = read_order(folder) if command and command[0] in SUBMITTED else None
    return RunStatus(
        folder=folder,
        job_id=shown.submission.job_id,
        cluster=shown.submission.cluster,
        submitted=shown.submission.submitted,
        state=state,
        why=shown.why,
        nodes=list(job.nodes) or ([] if last is None or waits else last.nodes),
        world_size=None if last is None else last.world_size,
        restarts=restarts_of(attempts, job.history, _reasons(files, attempts, jobs), stopped),
        progress=read_progress(folder, training_since=last.started if trains and last else None),
        starts=job.start if waits else None,
        ends=job.end if state == "running" else None,
        error=shown.found.words if wrong else "",
        error_rank=shown.found.rank if wrong else None,
        others=[one.submission.job_id for one in living if one is not shown],
        problem=problem if shown.submission.cluster == "slurm" else "",
        command="" if order is None else order.line,
        output="" if order is None else order.output or "",
    )


def _reasons(files: JobFolder, attempts: Sequence[Attempt], jobs: Sequence[JudgedJob]) -> dict[int, Blame]:
    """Attempt number -> why it ended, of those after which there was another."""
    submissions = {one.submission.job_id: one.submission for one in jobs}
    ends = log_starts(attempts)
    return {
        attempt.number: blame(files, attempt, submissions[attempt.job_id], ends.get(attempt.number))
        for attempt in attempts[:-1]
        if attempt.job_id in submissions and (attempt.outcome in (None, "failed") or attempt.retried)
    }


# Remove runs from the list of `graftvit jobs`; their folders stay as they are.


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
