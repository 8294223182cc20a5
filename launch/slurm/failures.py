"""Find out why an attempt ended: what a rank's error means, what the logs hold, and which rank is to blame.

When one rank dies, the others fail a moment later, with longer messages. Such errors of torch are recognized by their
text: the exception classes are too general, and some of them have changed.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ...checkpoints.files import UnreadableError, open_regular
from ...models.errors import GraftError, LostLoaderError
from ...transfer.engine.fence import FencedError
from .folder import NOTHING, Attempt, Failure, Job, JobFolder, Kind

AWAY = (
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN, errno.ESHUTDOWN,
    errno.ENOLINK,
)  # fmt: skip
"""What the system reports about a file whose file system does not answer."""

_LASTING = r"ncclInvalidUsage|ncclInvalidArgument|Duplicate GPU detected|mismatch.*between ranks"
_NO_MEMORY = r"out of memory|OutOfMemoryError|can't allocate memory|Cannot allocate memory|MemoryError"
_LOST = (
    r"Connection closed by peer|Connection reset by peer|Broken pipe|pair closure|Software caused connection abort"
    r"|Timed out waiting \d+ms for (recv|send) operation|Socket closed|socket timeout|recvValue failed"
    r"|failed to recv, got 0 bytes|wait timeout after \d+ms|client socket has timed out|Timed out after \d+ seconds"
    r"|waiting for clients|Connect timeout|Gloo connectFullMesh failed|Connection was likely closed"
    r"|NCCL communicator (was|is) (aborted|.*abort)|ncclRemoteError|ncclSystemError|ncclInProgress"
    r"|Watchdog caught collective operation timeout|remote process exited|Store is (closed|not available)"
    r"|Dist(Backend|Network|Store)?Error|heartbeat monitor|remote worker crashing"
    r"|socketProgress|Last error:"
)
"""What gloo, NCCL and torch's store report about a rank that does not answer, or about an aborted communicator."""
_MACHINE = (
    r"EADDRINUSE|address already in use|uncorrectable ECC|hardware error|fell off the bus|NVLink"
    r"|busy or unavailable|system not yet initialized|No CUDA GPUs are available|no CUDA-capable device"
    r"|ncclUnhandledCudaError|ncclInternalError|CUDA error: unknown error"
    r"|DataLoader worker \(pid\(?s?\)?.*(killed by signal: (Killed|Terminated)|exited unexpectedly)"
)
"""Errors whose reason is a machine, and not the run."""


def classify(error: BaseException, *, saved: bool) -> tuple[Kind, bool]:
    """Return whether a rank failed by itself, and whether a restart may help.

    A run that has `saved` a new state has memory enough, as a rule; one that has not will run out of it each time.
    """
    chain = _chain(error)
    text = "\n".join(f"{type(one).__name__}: {one}" for one in chain)
    if isinstance(error, FencedError):  # another attempt is at work
        return "cause", False
    if any(_is_away(one) or isinstance(one, LostLoaderError) for one in chain):
        return "cause", True
    if isinstance(error, GraftError) or _says(_LASTING, text):
        return "cause", False
    if _says(_NO_MEMORY, text):
        return "cause", saved
    if _says(_MACHINE, text):
        return "cause", True
    if _says(_LOST, text):
        return "consequence", True
    return "cause", False


def is_consequence(text: str) -> bool:
    """Return whether the last error in the text of a rank is only a consequence of another rank's failure."""
    raised = [match.start() for match in re.finditer(r"^[\w.]*(Error|Exception)\b", text, re.MULTILINE)]
    return _says(_LOST, text[raised[-1] :] if raised else text)


def _says(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.IGNORECASE) is not None


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and the errors that caused it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


def _is_away(error: BaseException) -> bool:
    """Return whether a file could not be reached; data workers and other languages give the error number as text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in AWAY
    numbers = re.findall(r"\[Errno (\d+)\]|\(os error (\d+)\)", str(error))
    return any(int(first or second) in AWAY for first, second in numbers)


# Find the logs of a job, read their last lines, and follow them.

POLL = 0.5
ASK = 5.0
"""Seconds between two looks at the files, and between two questions whether the run has ended."""
_CHUNK = 1 << 16


def log_files(job: Job, rank: int) -> tuple[Path, Path]:
    """Standard error and standard output of a rank, as submitit names them."""
    folder = Path(job.logs)
    stem = f"{job.job_id}_{rank}_log"
    return folder / f"{stem}.err", folder / f"{stem}.out"


def ranks_with_logs(job: Job) -> list[int]:
    """Return ranks that have a log."""
    names = Path(job.logs).glob(f"{job.job_id}_*_log.*")
    found = (re.fullmatch(r"(\d+)_log\.(out|err)", path.name[len(job.job_id) + 1 :]) for path in names)
    return sorted({int(match[1]) for match in found if match is not None})


def tail(path: Path, lines: int) -> str:
    """Return the last `lines` lines; empty if the file does not exist yet. Only the end of a long file is read."""
    try:
        with open_regular(path, refusal=UnreadableError) as file:
            end = file.seek(0, 2)
            data = b""
            while end > 0 and data.count(b"\n") <= lines:
                begin = max(0, end - _CHUNK)
                file.seek(begin)
                data, end = file.read(end - begin) + data, begin
    except OSError:
        return ""
    return "".join(data.decode("utf-8", "replace").splitlines(keepends=True)[-lines:]) if lines > 0 else ""


def new_text(path: Path, place: int, *, lines: bool = True) -> tuple[str, int]:
    """Return what was added to a file behind `place`, and the next place; with `lines` only whole lines.

    A truncated file is read from its beginning again.
    """
    try:
        with open_regular(path, refusal=UnreadableError) as file:
            place = place if file.seek(0, 2) >= place else 0
            file.seek(place)
            data = file.read()
    except OSError:  # not there yet
        return "", place
    data = data[: data.rfind(b"\n") + 1] if lines else data
    return data.decode("utf-8", "replace"), place + len(data)


def follow(
    files: Callable[[], tuple[Path, ...]], ended: Callable[[], bool], places: dict[Path, int]
) -> Iterator[tuple[Path, str]]:
    """Yield texts as they are written, from the `places` that were read, until the run has ended.

    The `files` are asked for again and again, because a run may be submitted again.
    """
    asked, over = time.monotonic(), False
    while not over:
        if time.monotonic() - asked >= ASK:
            asked, over = time.monotonic(), ended()
        for path in files():
            text, places[path] = new_text(path, places.get(path, 0), lines=not over)
            if text:
                yield path, text
        time.sleep(0 if over else POLL)


def all_files(job: Job) -> tuple[Path, ...]:
    """Standard error and standard output of each rank that has a log, by rank."""
    return tuple(path for rank in ranks_with_logs(job) for path in log_files(job, rank))


# Find why an attempt ended: first what Slurm wrote into the log, then the rank whose error is a cause.
#
# When a node dies or the kernel kills a rank, that rank writes nothing. The other ranks report errors that mean only
# that they lost it: such an error counts only if there is no other.

SILENT = "ended without a word"
_BY_SLURM = ("srun:", "slurmstepd")
_LINES = 15
_ENDING = re.compile(r"Terminating StepId|CANCELLED AT|Job step aborted|Force Terminated")
_NODE = re.compile(r"^srun: error: Node failure on (\S+)", re.MULTILINE)
_TASK = re.compile(
    r"^srun: error: (\S+): tasks? (\d+)\S*: (Out Of Memory|Killed|Segmentation fault|Bus error|Illegal instruction)",
    re.MULTILINE,
)
_UNRUNNABLE = re.compile(
    r"^srun: error: (\S+): tasks? (\d+)\S*: Exited with exit code (12[67])$", re.MULTILINE
)
"""The codes of `env` and `sh` for a program that cannot be run, or is not there; a run leaves with no such code."""
_MEMORY = re.compile(r"oom[-_ ]?kill", re.IGNORECASE)

_DUE = re.compile(r"DUE TO (NODE FAILURE|PREEMPTION|TIME LIMIT)")
_STATES = {"NODE FAILURE": "node failed", "PREEMPTION": "preempted", "TIME LIMIT": "timed out"}
NO_MEMORY = "out of memory"


def blame(files: JobFolder, attempt: Attempt, job: Job, until: int | None = None) -> Failure:
    """Return why an attempt ended: by Slurm, by the records of its ranks, or by the loudest log.

    The log of the next attempt begins at `until`.
    """
    said = said_of(attempt, job, until)
    if said.why:
        return said
    failures = files.failures(attempt.name)
    if failures:
        return _by_rank(failures[0])
    return _loudest_log(job) if attempt.outcome is None and until is None else NOTHING


def said_of(attempt: Attempt, job: Job, until: int | None = None) -> Failure:
    """Return what Slurm wrote about the end of an attempt; nothing if it wrote nothing."""
    if attempt.log_start is None:  # where its part of the log begins is not known
        return NOTHING
    try:
        with open_regular(log_files(job, 0)[0], refusal=UnreadableError) as file:
            end = file.seek(0, 2) if until is None else until
            begin = max(attempt.log_start, end - _CHUNK)
            file.seek(begin)
            return _said(file.read(max(0, end - begin)).decode("utf-8", "replace"), job)
    except OSError:
        return NOTHING


def blame_start(job: Job, *, first: bool = True) -> Failure:
    """Return what the log says about a start that ended before the run began, such as without a copy of its code.

    Unless it is the `first` start, only what Slurm wrote: the other lines may be of an earlier one.
    """
    words = tail(log_files(job, 0)[0], _LINES)
    said = _said(words, job)
    if said.why and not said.transient:
        return said
    lines = words.splitlines()
    begin = max((number + 1 for number, line in enumerate(lines) if "CANCELLED AT" in line), default=0)
    own = _own_lines(lines[begin:]) if first else []
    return Failure(0, text=words, why=own[-1]) if own else NOTHING


def _said(log: str, job: Job) -> Failure:
    """Return what Slurm wrote, with the last line of a rank that could not even start."""
    said = said_by_slurm(log)
    if said.transient or said.rank is None:
        return said
    own = _own_lines(tail(log_files(job, said.rank)[0], _LINES).splitlines())
    return replace(said, why=f"{said.why}: {own[-1].strip()}"[:500]) if own else said


def _own_lines(lines: Iterable[str]) -> list[str]:
    """Return the lines that Slurm did not write."""
    return [line for line in lines if line.strip() and not line.startswith(_BY_SLURM)]


def said_by_slurm(log: str) -> Failure:
    """Return what `srun` and `slurmstepd` wrote into the log of the first rank."""
    text = "".join(f"{line}\n" for line in log.splitlines() if line.startswith(_BY_SLURM))
    if lost := list(dict.fromkeys(_NODE.findall(text))):
        return Failure(text=text, why=f"node failure: {', '.join(lost)}", state="node failed")
    if unrunnable := _UNRUNNABLE.search(text):
        node, rank, code = unrunnable.groups()
        why = f"rank {rank} on {node} could not run the interpreter (exit code {code})"
        return Failure(int(rank), transient=False, text=text, why=why, state="failed", node=node)
    ending = _ENDING.search(text)
    killed = _TASK.search(text, 0, len(text) if ending is None else ending.start())
    if killed is None:
        if _MEMORY.search(text):
            return Failure(text=text, why=NO_MEMORY, state="failed")
        due = _DUE.search(text)
        return Failure(text=text, why=due[1].lower(), state=_STATES[due[1]]) if due else NOTHING
    node, rank, word = killed.groups()
    if word == "Out Of Memory" or _MEMORY.search(text):
        why = f"{NO_MEMORY}: the system killed rank {rank} on {node}"
    elif word == "Killed":
        why = f"rank {rank} on {node} was killed (signal 9)"
    else:
        why = f"rank {rank} on {node}: {word}"
    return Failure(int(rank), text=text, why=why, state="failed", node=node)


def _by_rank(first: Failure) -> Failure:
    """Return the rank that failed first by an error of its own, or else the rank that first lost another."""
    lost = f"rank {first.rank} lost another: " if first.kind == "consequence" else ""
    # without source locations, and without the advice that follows a lost connection
    line = re.sub(r"\[\S+\.(cc|cpp|h):\d+\] *", "", first.last_words or SILENT)
    line = re.sub(r"\. (This is typically|Check the logs).*", "", line)
    words = "".join(first.text.splitlines(keepends=True)[-_LINES:])
    return replace(first, text=words, why=f"{lost}{line}"[:500])


def _loudest_log(job: Job) -> Failure:
    logs = {rank: log_files(job, rank)[0] for rank in ranks_with_logs(job)}
    texts = {rank: text for rank, path in logs.items() if (text := tail(path, 100)).strip()}
    loud = [rank for rank in texts if re.search(r"Traceback|[Ee]rror", texts[rank])] or list(texts)
    if not loud:
        return NOTHING
    rank = min(loud, key=lambda rank: (is_consequence(texts[rank]), logs[rank].stat().st_mtime_ns))
    return Failure(rank, text="".join(texts[rank].splitlines(keepends=True)[-_LINES:]))
