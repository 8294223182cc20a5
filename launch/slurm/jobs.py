"""How a run on a cluster is: what its files say, checked against the scheduler."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...models.errors import ConfigError, GraftError
from .files import Attempt, JobFolder, Submission
from .logs import error_of
from .lookup import find_submissions
from .processes import is_alive
from .progress import Progress, read_progress
from .scheduler import UNKNOWN, JobState, job_states
from .sweep import load_sweep

WAITING = (
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
)
AT_WORK = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
ENDINGS = {
    "CANCELLED": "cancelled",
    "TIMEOUT": "timed out",
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node failed",
    "COMPLETED": "unknown",
    "REVOKED": "cancelled",
}
ACTIVE = ("pending", "requeued", "running", "stopping")
SILENT = "ended without a word"


@dataclass(frozen=True)
class Restart:
    """That a run was started again, and why."""

    attempt: int
    started: float
    nodes: list[str]
    why: str


@dataclass(frozen=True)
class RunStatus:
    """A run as it is now."""

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
    ends: float | None = None
    """When the limit ends a running job, Unix time."""
    error: str = ""
    """How the rank failed that failed first; empty where nothing failed."""
    error_rank: int | None = None

    @property
    def active(self) -> bool:
        """Whether it waits, runs, or will be started again."""
        return self.state in ACTIVE


def run_folders(folder: Path) -> list[Path]:
    """The run itself, or the cells of a sweep or comparison that were submitted, the run of its teacher first.

    Raises ConfigError: nothing was submitted to the folder.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: give the output_dir of a run")
    sweep = load_sweep(folder)
    cells = [cell.folder for cell in sweep.cells] if sweep else sorted((folder / "cells").glob("*"))
    if cells and not sweep:
        cells.insert(0, folder / "teacher")
    found = _submitted(cells) or _submitted([folder])
    if found:
        return found
    raise ConfigError(
        f"{folder} was never submitted: `graftvit submit CONFIG --output_dir {folder}` does that"
    )


def _submitted(runs: Sequence[Path]) -> list[Path]:
    """Those with a submission, or with a job without one. Raises GraftError: nobody tells."""
    try:
        return [run for run, known in find_submissions(runs).items() if known]
    except GraftError:
        recorded = [run for run in runs if JobFolder(run).submissions()]
        if recorded:
            return recorded
        raise


def describe_run(folder: Path) -> RunStatus:
    """How one run is. Raises ConfigError: it was never submitted."""
    return describe_runs([folder])[0]


def describe_runs(folders: Iterable[Path]) -> list[RunStatus]:
    """How runs are, with one question to the scheduler for all. Raises ConfigError: one was never submitted."""
    found = judge_jobs(folders)
    for folder, jobs in found.items():
        if not jobs:
            raise ConfigError(f"{folder} was never submitted: `graftvit submit` does that")
    return [_status(JobFolder(folder), jobs) for folder, jobs in found.items()]


@dataclass(frozen=True)
class JudgedJob:
    """A submission, and how its job is."""

    submission: Submission
    job: JobState
    """What the scheduler says of it."""
    state: str
    """As in `RunStatus`."""
    why: str

    @property
    def active(self) -> bool:
        """Whether it waits, runs, or will be started again."""
        return self.state in ACTIVE

    @property
    def words(self) -> str:
        """What to call it in a sentence."""
        return f"job {self.submission.job_id}" if self.submission.job_id else self.why


def judge_jobs(
    runs: Iterable[Path], *, strict: bool = False, by_name: bool = True
) -> dict[Path, list[JudgedJob]]:
    """How all jobs of each run are, the oldest first.

    Args:
        runs: Run folders, submitted or not.
        strict: Raise GraftError where Slurm does not answer; else the files tell.
        by_name: As in `find_submissions`.
    """
    runs, problem = list(runs), ""
    try:
        found = find_submissions(runs, by_name=by_name)
        ids = [
            one.job_id for known in found.values() for one in known if one.cluster == "slurm" and one.job_id
        ]
        states = job_states(ids)
    except GraftError as error:
        if strict:
            raise
        found = {run: JobFolder(run).submissions() for run in runs}
        states, problem = {}, str(error)
    return {
        run: [_judged(JobFolder(run), one, states, problem) for one in known] for run, known in found.items()
    }


def _judged(
    files: JobFolder, submission: Submission, states: Mapping[str, JobState], problem: str
) -> JudgedJob:
    job = states.get(submission.job_id, JobState())
    last = _last_attempt(files, submission)
    if not submission.job_id and not problem:
        return JudgedJob(submission, job, "pending", "being submitted")
    if submission.cluster != "slurm":
        problem = ""
        if is_alive(submission):
            job = JobState("RUNNING", restarts=0 if last is None else last.restart)
    return JudgedJob(submission, job, *judge(job, last, stopping=files.stop_path.exists(), problem=problem))


def _last_attempt(files: JobFolder, submission: Submission) -> Attempt | None:
    of_job = [attempt for attempt in files.attempts() if attempt.job_id == submission.job_id]
    return of_job[-1] if of_job else None


def _status(files: JobFolder, jobs: Sequence[JudgedJob]) -> RunStatus:
    """Of the newest job that is at work, or of the newest."""
    now = next((one for one in reversed(jobs) if one.active), jobs[-1])
    submission, job, state = now.submission, now.job, now.state
    last = _last_attempt(files, submission)
    rank, error = None, ""
    if state in ("failed", "unknown") and last is not None:
        rank, error = error_of(files, last.number, submission, silent=last.outcome is None)
    nodes = list(job.nodes) or ([] if last is None or state in ("pending", "requeued") else last.nodes)
    return RunStatus(
        folder=files.output_dir,
        job_id=submission.job_id,
        cluster=submission.cluster,
        submitted=submission.submitted,
        state=state,
        why=now.why,
        nodes=nodes,
        world_size=None if last is None else last.world_size,
        restarts=restarts_of(files.attempts(), job.history),
        progress=read_progress(files.output_dir),
        ends=job.end if state == "running" else None,
        error=error,
        error_rank=rank,
    )


def judge(job: JobState, last: Attempt | None, *, stopping: bool, problem: str = "") -> tuple[str, str]:
    """The state in plain words, and why.

    Args:
        job: What the scheduler says.
        last: The last attempt of this job that wrote files.
        stopping: Whether the run was asked to stop.
        problem: Why the scheduler could not be asked.
    """
    if job.state in WAITING:
        again = job.restarts > 0 or last is not None
        return ("requeued" if again else "pending"), job.reason
    now = last if last is not None and last.restart >= job.restarts else None
    if job.state in AT_WORK:
        return _at_work(job, now, stopping)
    if last is not None and last.outcome == "finished":
        return "finished", ""
    if job.state == UNKNOWN:
        return _by_files(last, problem, stopping)
    return _ended(job, now)


def _at_work(job: JobState, now: Attempt | None, stopping: bool) -> tuple[str, str]:
    """A job that holds nodes."""
    if now is None:
        return ("stopping", "") if stopping else ("running", "starting")
    if now.outcome == "requeued":
        return "requeued", now.signal
    if now.outcome is not None:  # its nodes are not free yet, and its other ranks may hang: it can be stopped
        return "stopping", f"{now.outcome}: {now.why}" if now.why else now.outcome
    if now.signal or stopping or job.state == "COMPLETING":
        return "stopping", now.signal
    return "running", "" if job.state in ("RUNNING", "COMPLETING") else job.state.lower()


def _ended(job: JobState, now: Attempt | None) -> tuple[str, str]:
    """A job that the scheduler calls ended, and that did not finish."""
    if now is not None and now.outcome == "stopped" and job.state != "CANCELLED":
        return "stopped", now.signal
    state = ENDINGS.get(job.state, "failed")
    if now is not None and now.outcome == "failed" and state in ("failed", "unknown"):
        return "failed", now.why
    said = "" if now is None else now.signal
    if state == "unknown":
        return state, SILENT
    detail = "" if job.exit_code in ("", "0:0") else f"exit code {job.exit_code.partition(':')[0]}"
    if state == "failed":
        named = "" if job.state == "FAILED" else job.state.lower().replace("_", " ")
        return state, ", ".join(filter(None, [named, job.reason, detail])) or SILENT
    return state, said or job.reason


def _by_files(last: Attempt | None, problem: str, stopping: bool) -> tuple[str, str]:
    """A job of which nobody but its files can tell."""
    if last is not None and last.outcome in ("finished", "stopped", "failed"):
        return last.outcome, last.why or last.signal
    if problem:
        seen = "no attempt has begun" if last is None else f"attempt {last.number} has not said how it ended"
        return "unknown", f"{problem}; {seen}"
    if stopping and (last is None or last.outcome is None):
        return "cancelled", "`graftvit stop`"
    if last is None:
        return "unknown", "it never began, and the scheduler no longer knows it"
    for word, state in {
        "cancelled": "cancelled",
        "time limit": "timed out",
        "preempted": "preempted",
    }.items():
        if word in last.signal and last.outcome is None:
            return state, last.signal
    if last.outcome == "requeued":
        return "unknown", f"was to be requeued after {last.signal or 'a signal'}, and did not begin again"
    return "unknown", SILENT


def restarts_of(attempts: Sequence[Attempt], history: Sequence[str] = ()) -> list[Restart]:
    """Each attempt but the first, and why there had to be another."""
    found = []
    words = {"NODE_FAIL": "node failure", "PREEMPTED": "preempted", "TIMEOUT": "time limit"}
    for before, attempt in itertools.pairwise(attempts):
        same_job = before.job_id == attempt.job_id
        known = history[before.restart] if same_job and before.restart < len(history) else ""
        why = attempt.before or before.signal or (before.why if before.outcome == "failed" else "")
        why = why or words.get(known, "") or (before.outcome or SILENT)
        found.append(Restart(attempt.number, attempt.started, attempt.nodes, why))
    return found
