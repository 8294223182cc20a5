"""Find why an attempt ended: first what the scheduler wrote into the log, then the rank whose error is a cause.

When a node dies or the kernel kills a rank, that rank writes nothing. The other ranks report errors that mean only
that they lost it: such an error counts only if there is no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ...checkpoints.files import UnreadableError, open_regular
from .failures import is_consequence
from .job_folder import Attempt, JobFolder, Submission
from .logs import log_files, ranks_with_logs, tail

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
