"""Describe the state of a job in plain words, and why: by the scheduler, the files of its run, and its last error.

Slurm's reasons are in plain English, with Slurm's own word beside them.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...checkpoints.files import UnreadableError, open_regular
from .failures import is_consequence
from .job_folder import Attempt, JobFolder, Submission
from .logs import log_files, ranks_with_logs, tail
from .scheduler import UNKNOWN, JobState

# Find why an attempt ended: first what the scheduler wrote into the log, then the rank whose error is a cause.
#
# When a node dies or the kernel kills a rank, that rank writes nothing. The other ranks report errors that mean only
# that they lost it: such an error counts only if there is no other.

SILENT = "ended without a word"
_BY_SLURM = ("srun:", "slurmstepd")
_LINES = 15
_CHUNK = 1 << 16
_ENDING = re.compile(r"Terminating StepId|CANCELLED AT|Job step aborted|Force Terminated")
_NODE = re.compile(r"^srun: error: Node failure on (\S+)", re.MULTILINE)
_TASK = re.compile(
    r"^srun: error: (\S+): tasks? (\d+)\S*: (Out Of Memory|Killed|Segmentation fault|Bus error|Illegal instruction)",
    re.MULTILINE,
)
_UNRUNNABLE = re.compile(
    r"^srun: error: (\S+): tasks? (\d+)\S*: Exited with exit code (126|127)$", re.MULTILINE
)
"""The codes of `env` and `sh` for a program that cannot be run, or is not there; a run leaves with no such code."""
_MEMORY = re.compile(r"oom[-_ ]?kill", re.IGNORECASE)


@dataclass(frozen=True)
class Blame:
    """The best reason found for an end; empty without one."""

    why: str = ""
    """The reason in one line."""
    words: str = ""
    """The last words of the rank, or of the scheduler."""
    rank: int | None = None
    state: str = ""
    """`node failed`, `failed`, or empty where only the files of the ranks tell."""
    lasting: bool = False
    """Whether a restart would certainly end the same way."""


NOTHING = Blame()


def blame(files: JobFolder, attempt: Attempt, submission: Submission, until: int | None = None) -> Blame:
    """Return why an attempt ended.

    Args:
        files: Of the run.
        attempt: The attempt.
        submission: Of its job; names the logs.
        until: Where the log of the next attempt begins.
    """
    said = _said(_log(attempt, submission, until), submission)
    if said.why:
        return said
    errors = _errors(files, attempt)
    if errors:
        return errors
    return _loudest_log(submission) if attempt.outcome is None and until is None else NOTHING


def said_of(files: JobFolder, attempt: Attempt) -> Blame:
    """Return what Slurm wrote about the end of the last attempt of a job; nothing if it wrote nothing."""
    submission = files.submission_of(attempt.job_id)
    return NOTHING if submission is None else _said(_log(attempt, submission, None), submission)


def blame_start(submission: Submission, *, first: bool = True) -> Blame:
    """Return what the log says about a start that ended before the run began, such as without a copy of its code.

    Unless it is the `first` start, only what Slurm wrote: the other lines may be of an earlier one.
    """
    words = tail(log_files(submission, 0)[0], _LINES)
    said = _said(words, submission)
    if said.lasting:
        return said
    lines = words.splitlines()
    begin = max((number + 1 for number, line in enumerate(lines) if "CANCELLED AT" in line), default=0)
    own = _own_lines(lines[begin:]) if first else []
    return Blame(own[-1], words, 0) if own else NOTHING


def _said(log: str, submission: Submission) -> Blame:
    """Return what Slurm wrote, with the last line of a rank that could not even start."""
    said = said_by_slurm(log)
    if not said.lasting or said.rank is None:
        return said
    own = _own_lines(tail(log_files(submission, said.rank)[0], _LINES).splitlines())
    return replace(said, why=f"{said.why}: {own[-1].strip()}"[:500]) if own else said


def _own_lines(lines: Iterable[str]) -> list[str]:
    """Return the lines that Slurm did not write."""
    return [line for line in lines if line.strip() and not line.startswith(_BY_SLURM)]


def said_by_slurm(log: str) -> Blame:
    """Return what `srun` and `slurmstepd` wrote into the log of the first rank."""
    lines = [line for line in log.splitlines() if line.startswith(_BY_SLURM)]
    text = "\n".join(lines)
    if lost := list(dict.fromkeys(_NODE.findall(text))):
        return Blame(f"node failure: {', '.join(lost)}", f"{text}\n", state="node failed")
    if "DUE TO NODE FAILURE" in text:
        return Blame("node failure", f"{text}\n", state="node failed")
    if unrunnable := _UNRUNNABLE.search(text):
        node, rank, code = unrunnable.groups()
        why = f"rank {rank} on {node} could not run the interpreter (exit code {code})"
        return Blame(why, f"{text}\n", int(rank), "failed", lasting=True)
    ending = _ENDING.search(text)
    killed = _TASK.search(text, 0, len(text) if ending is None else ending.start())
    if killed is None:
        return Blame("out of memory", f"{text}\n", state="failed") if _MEMORY.search(text) else NOTHING
    node, rank, word = killed.groups()
    if word == "Out Of Memory" or _MEMORY.search(text):
        why = f"out of memory: the system killed rank {rank} on {node}"
    elif word == "Killed":
        why = f"rank {rank} on {node} was killed (signal 9), as the system does where memory runs out"
    else:
        why = f"rank {rank} on {node}: {word}"
    return Blame(why, f"{text}\n", int(rank), "failed")


def shorten(line: str) -> str:
    """Return an error's last line, without source locations and without the advice that follows a lost connection."""
    line = re.sub(r"\[\S+\.(cc|cpp|h):\d+\] *", "", line)
    return re.sub(r"\. (This is typically|Check the logs).*", "", line)


def _errors(files: JobFolder, attempt: Attempt) -> Blame | None:
    """Return the rank that failed first by an error of its own, or else the rank that first lost another."""
    failures = files.failures(attempt.name)
    if not failures:
        return None
    first = failures[0]
    lost = f"rank {first.rank} lost another: " if first.kind == "consequence" else ""
    words = "".join(first.text.splitlines(keepends=True)[-_LINES:])
    return Blame(f"{lost}{shorten(first.last_words or SILENT)}"[:500], words, first.rank)


def _loudest_log(submission: Submission) -> Blame:
    logs = {rank: log_files(submission, rank)[0] for rank in ranks_with_logs(submission)}
    texts = {rank: tail(path, 100) for rank, path in logs.items()}
    texts = {rank: text for rank, text in texts.items() if text.strip()}
    loud = [rank for rank in texts if re.search(r"Traceback|[Ee]rror", texts[rank])] or list(texts)
    if not loud:
        return NOTHING
    rank = min(loud, key=lambda rank: (is_consequence(texts[rank]), logs[rank].stat().st_mtime_ns))
    return Blame("", "".join(texts[rank].splitlines(keepends=True)[-_LINES:]), rank)


def _log(attempt: Attempt, submission: Submission, until: int | None) -> str:
    """Return the end of an attempt's part of the first rank's log; empty if the start of that part is unknown."""
    if attempt.log_start is None:
        return ""
    try:
        with open_regular(log_files(submission, 0)[0], refusal=UnreadableError) as file:
            end = file.seek(0, 2) if until is None else until
            begin = max(attempt.log_start, end - _CHUNK)
            file.seek(begin)
            return file.read(max(0, end - begin)).decode("utf-8", "replace")
    except OSError:
        return ""


def log_starts(attempts: Sequence[Attempt]) -> dict[int, int]:
    """Attempt number -> where the log of the next attempt of the same job begins."""
    found = {}
    for number, attempt in enumerate(attempts):
        later = [after.log_start for after in attempts[number + 1 :] if after.job_id == attempt.job_id]
        if later and later[0] is not None:
            found[attempt.number] = later[0]
    return found


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
STARTING = "starting"
BY_STOP = "`graftvit jobs stop`"
_HISTORY = {
    "NODE_FAIL": "node failure",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "TIMEOUT": "time limit",
}


@dataclass(frozen=True)
class Restart:
    """A restart of a run, and its reason."""

    attempt: int
    started: float
    nodes: list[str]
    why: str


@dataclass(frozen=True)
class Evidence:
    """What the state of a job is judged by.

    Attributes:
        folder: The run folder.
        job: What the scheduler reports.
        last: The last attempt of this job that wrote files.
        stopping: Whether the run was asked to stop.
        problem: Why the scheduler could not be asked.
        found: Why the last attempt ended, if it failed.
    """

    folder: Path
    job: JobState
    last: Attempt | None = None
    stopping: bool = False
    problem: str = ""
    found: Blame = NOTHING

    @property
    def now(self) -> Attempt | None:
        """Return the attempt that the scheduler reports; None if that has written nothing (yet)."""
        return self.last if self.last is not None and self.last.restart >= self.job.restarts else None


def judge(seen: Evidence) -> tuple[str, str]:
    """Return the state in plain words, and why."""
    job, last = seen.job, seen.last
    if job.state in WAITING:
        again = job.restarts > 0 or last is not None
        return ("requeued" if again else "pending"), waiting(job.reason, job.start)
    if job.state in AT_WORK:
        return _at_work(seen)
    if last is not None and last.outcome == "finished":
        return "finished", ""
    if job.state == UNKNOWN:
        return _by_files(seen)
    return _ended(seen)


def _at_work(seen: Evidence) -> tuple[str, str]:
    """Judge a job that holds nodes."""
    job, now = seen.job, seen.now
    held = "" if job.state in ("RUNNING", "COMPLETING") else job.state.lower()
    if now is None:
        return ("stopping", held) if seen.stopping else ("running", held or STARTING)
    if now.outcome == "requeued":
        return "requeued", now.signal
    if now.outcome is not None:  # its nodes are not free yet, and its other ranks may hang: it can be stopped
        why = seen.found.why or now.why
        return "stopping", f"{now.outcome}: {why}" if why else now.outcome
    if now.signal or seen.stopping or job.state == "COMPLETING":
        return "stopping", now.signal or held
    return "running", held


def _ended(seen: Evidence) -> tuple[str, str]:
    """Judge a job that the scheduler reports as ended, and that did not finish."""
    job, now, found = seen.job, seen.now, seen.found
    by_stop = BY_STOP if seen.stopping else ""
    if now is not None and now.outcome == "stopped" and job.state != "CANCELLED":
        return "stopped", by_stop or now.signal
    state = ENDINGS.get(job.state, "failed")
    if state == "cancelled" and by_stop:
        return state, by_stop
    if state in ("failed", "unknown"):
        return _failed(seen, state)
    said = "" if now is None else now.signal
    return state, said or (found.why if found.state == state else "") or job.reason


def _failed(seen: Evidence, state: str) -> tuple[str, str]:
    job, now, found = seen.job, seen.now, seen.found
    noted = "" if now is None else now.why
    if found.state:
        return found.state, fuller(found.why, noted)
    if now is not None and now.outcome == "failed":
        return "failed", fuller(found.why, noted)
    if state == "unknown":
        return state, SILENT
    named = "" if job.state == "FAILED" else job.state.lower().replace("_", " ")
    launch = launch_failure(job.reason, job.exit_code, seen.folder)
    words = [named, launch or found.why or job.reason, "" if launch else exit_words(job.exit_code)]
    return state, ", ".join(filter(None, words)) or SILENT


def fuller(found: str, noted: str) -> str:
    """Return what was found, or the attempt's own note if that says more, for example that it was restarted."""
    return noted if not found or found in noted else found


def exit_words(code: str) -> str:
    """`status:signal` as `exit code 1` or `killed by signal 9`; a shell gives 128 + the signal."""
    status, _, signal = code.partition(":")
    if signal not in ("", "0"):
        return f"killed by signal {signal}"
    if status in ("", "0"):
        return ""
    return f"exit code {status}" + (" (killed by signal 9)" if status == "137" else "")


def _by_files(seen: Evidence) -> tuple[str, str]:
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
    for word, state in {
        "cancelled": "cancelled",
        "time limit": "timed out",
        "preempted": "preempted",
    }.items():
        if word in last.signal and last.outcome is None:
            return state, last.signal
    if last.outcome == "requeued":
        return "unknown", f"was to be requeued after {last.signal or 'a signal'}, and did not begin again"
    return (found.state, found.why) if found.state else ("unknown", SILENT)


def restarts_of(
    attempts: Sequence[Attempt],
    history: Sequence[str] = (),
    found: Mapping[int, Blame] | None = None,
    stopped: Collection[str] = (),
) -> list[Restart]:
    """Return each attempt but the first, and why there had to be another.

    Args:
        attempts: All, the first one first.
        history: How the scheduler says that the starts of the last job ended.
        found: Attempt number -> why it ended, where it did not end well.
        stopped: Jobs that `graftvit jobs stop` has told to end.
    """
    return [
        Restart(
            attempt.number,
            attempt.started,
            attempt.nodes,
            BY_STOP
            if _was_stopped(before, attempt, stopped)
            else _why_again(before, attempt, history, found or {}),
        )
        for before, attempt in itertools.pairwise(attempts)
    ]


def _was_stopped(before: Attempt, attempt: Attempt, stopped: Collection[str]) -> bool:
    """Return whether `before` was the last attempt of a job that was asked to stop, and ended by that."""
    last = before.job_id != attempt.job_id
    return last and before.job_id in stopped and before.outcome in (None, "stopped")


def _why_again(before: Attempt, attempt: Attempt, history: Sequence[str], found: Mapping[int, Blame]) -> str:
    same_job = before.job_id == attempt.job_id
    known = history[before.restart] if same_job and before.restart < len(history) else ""
    blame = found.get(before.number, NOTHING)
    return (
        attempt.before
        or (fuller(blame.why, before.why) if blame.state else "")
        or (_HISTORY[known] if known in ("NODE_FAIL", "OUT_OF_MEMORY") else "")
        or (before.why if before.retried else "")
        or before.signal
        or (blame.why or before.why if before.outcome == "failed" else "")
        or _HISTORY.get(known, "")
        or before.outcome
        or SILENT
    )


WAITS = {
    "Resources": "waits for nodes",
    "Priority": "waits behind jobs of higher priority",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "waits for ever: the job that it follows has failed",
    "BeginTime": "waits until its begin time",
    "ReqNodeNotAvail": "waits for nodes that are down, drained or reserved",
    "Nodes_required_for_job_are_DOWN": "waits for nodes that are down, drained or reserved",
    "NodeDown": "waits for a node that is down",
    "PartitionDown": "waits for its partition, which is down",
    "PartitionInactive": "waits for its partition, which takes no jobs now",
    "PartitionConfig": "waits for what its partition does not have",
    "PartitionNodeLimit": "waits for more nodes than its partition gives a job",
    "PartitionTimeLimit": "waits for more time than its partition gives a job",
    "Reservation": "waits for its reservation",
    "Licenses": "waits for licenses",
    "Cleaning": "waits until its last start is cleaned up",
    "JobArrayTaskLimit": "waits for cells of its array: --array_parallelism",
    "JobHeldUser": "is held: `scontrol release` lets it go",
    "JobHeldAdmin": "is held by an administrator",
    "launch_failed_requeued_held": "is held: its nodes could not start it",
    "InvalidAccount": "waits for an account that is not valid",
    "InvalidQOS": "waits for a QOS that is not valid",
    "BadConstraints": "waits for nodes that do not exist",
}
_LIMITS = (
    (r"(QOS|Assoc)?MaxJobsPer(User|Account).*|(QOS|Assoc)MaxJobsLimit", "waits until fewer of your jobs run"),
    (r"(QOS|Assoc).*(Max|Grp)(Submit).*", "waits until fewer jobs are queued"),
    (
        r"(QOS|Assoc).*(Max|Grp).*(Wall|RunMinutes|CPUMins).*",
        "waits for the time budget of your account or QOS",
    ),
    (r"(QOS|Assoc).*", "waits for a limit of your account or QOS"),
)
_LAUNCH = "its nodes could not start it: most often they do not see {folder} or may not write there"
STARTS = {
    "JobLaunchFailure": _LAUNCH,
    "launch_failed_requeued_held": _LAUNCH,
    "RaisedSignal:53": _LAUNCH,
    "BadConstraints": "no nodes are as it asks for",
}


def waiting(reason: str, start: float | None = None) -> str:
    """Return why a job waits, as in `waits for nodes: Resources`.

    Args:
        reason: Slurm's word, with what it may add after a comma.
        start: When it is expected to start; that of `BeginTime` is certain.
    """
    word = reason.partition(",")[0].strip()
    if not word:
        return ""
    if word == "BeginTime" and start is not None:
        return f"waits until {clock(start)}: {word}"
    plain = WAITS.get(word) or next(
        (text for pattern, text in _LIMITS if re.fullmatch(pattern, word)), "waits"
    )
    return f"{plain}: {reason}"


def launch_failure(reason: str, exit_code: str, folder: Path) -> str:
    """Return the most frequent reason why a job could not start at all, with Slurm's word; empty for other ends."""
    word = reason.partition("(")[0].strip() or ("RaisedSignal:53" if exit_code.endswith(":53") else "")
    text = STARTS.get(word, "")
    return f"{text.format(folder=folder)}: {reason or exit_code}" if text else ""


def clock(moment: float) -> str:
    """Return a time of day, with the date if it is not today."""
    then = time.localtime(moment)
    today = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", then)
