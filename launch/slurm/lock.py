"""Allow one submission into a folder at a time, from any shell or login node, and handle Ctrl-C during it.

A signal before the job is submitted ends the command. Between sbatch and the record of the job number, a signal waits.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from ...models.errors import ConfigError, GraftError
from ..say import hint
from .folder import Job

logger = logging.getLogger(__name__)
_mine: set[Path] = set()
"""Folders that this process submits to."""
FILE = ".submitting"
WAIT = 60.0
"""Seconds that a second submission waits for the first."""
_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of a file system that is configured without locks; filelock itself recognizes one that cannot lock."""


@contextmanager
def submitting(folder: Path, wait: float = WAIT) -> Iterator[None]:
    """Keep every other submission out of `folder`, that of a run, a sweep or a comparison.

    Raises ConfigError: another command has been submitting for all of `wait`, or the folder cannot be written.
    """
    lock = _acquired(folder, 0.0)
    if lock is None:
        logger.warning("waiting for another command that submits to %s, %.0f seconds at most", folder, wait)
        lock = _acquired(folder, wait)
    if lock is None:
        raise ConfigError(
            f"{folder} is being submitted by another command (or is run by it, with --cluster debug): "
            f"`{hint('jobs', folder)}` tells when it is through"
        )
    _mine.add(folder.resolve())
    try:
        yield
    finally:
        _mine.discard(folder.resolve())
        lock.release()


def is_submitting(folder: Path) -> bool:
    """Return whether another command holds the lock, on any machine."""
    if folder.resolve() in _mine or not (folder / FILE).exists():
        return False
    try:
        lock = _acquired(folder, 0.0)
    except ConfigError:  # another user's
        return False
    if lock is not None:
        lock.release()
    return lock is None


def _acquired(folder: Path, wait: float) -> BaseFileLock | None:
    path = folder / FILE
    lock: BaseFileLock = FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=wait)
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            lock = SoftFileLock(path.with_suffix(".pid"))
            lock.acquire(timeout=wait)
    except Timeout:
        return None
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
    return lock


ordered = threading.Event()
"""Set once this process may have given a job to a scheduler."""
HELD = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


class InterruptedSubmissionError(GraftError):
    """A signal has ended a submission, before or after the job was submitted; the exit code is the signal's."""

    def __init__(self, number: int, job: str = "", folder: Path | None = None) -> None:
        self.exit_code = 128 + number
        came = f"{signal.Signals(number).name} came while job {job} was being submitted, and it was"
        submitted = f"{came}: `{hint('jobs', 'stop', folder)}` ends it"
        super().__init__(submitted if folder else "stopped by Ctrl-C: nothing was submitted")


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise InterruptedSubmissionError where Ctrl-C ends the block before the first order: nothing was submitted."""
    ordered.clear()
    try:
        yield
    except KeyboardInterrupt as told:
        if ordered.is_set():
            raise
        raise InterruptedSubmissionError(signal.SIGINT) from told


@contextmanager
def unbroken() -> Iterator[list[int]]:
    """Delay signals that would end this process; yield those that arrived.

    Use handlers, not a mask: a child would keep the mask for its whole life. An ignored signal stays ignored.
    """
    came: list[int] = []
    ordered.set()

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    if threading.current_thread() is not threading.main_thread():  # no other one may have handlers
        yield came
        return
    before = {number: signal.getsignal(number) for number in HELD}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, remember)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Find and stop the processes of a job on this machine, and an sbatch that still runs.

CONTROLLER = "submitit.local._local"
SLACK = 2.0
"""Seconds by which the system's time of a process's start may be late."""


def is_alive(job: Job) -> bool:
    """Return whether the process of a `local` or `debug` job runs here, and no later one has its number."""
    try:
        if job.cluster == "debug":
            elsewhere = job.pid in (0, os.getpid()) or job.host != socket.gethostname()
            return not elsewhere and psutil.Process(job.pid).create_time() <= job.submitted + SLACK
        return " ".join(psutil.Process(int(job.job_id)).cmdline()).endswith(f"{CONTROLLER} {job.logs}")
    except (ValueError, psutil.Error):
        return False


def _processes(end: str) -> list[psutil.Process]:
    """Return those whose command line ends so; a zombie has none."""
    found = psutil.process_iter(["ppid", "cmdline"])
    return [one for one in found if " ".join(one.info["cmdline"] or ()).endswith(end)]


def watchers(logs: str) -> list[str]:
    """Return the ids of the processes that watch the jobs of a log folder: submitit's, or the shell before it."""
    found = {one.pid: one.info["ppid"] for one in _processes(f"{CONTROLLER} {logs}")}
    return [str(pid) for pid, parent in found.items() if parent not in found]


def is_ordered(script: Path) -> bool:
    """Return whether an sbatch with this script still runs, for example after the command that started it ended."""
    return bool(_processes(f" {script}"))


def stop_process(job: Job, *, now: bool = False) -> None:
    """Tell a `local` or `debug` job to save and end, or to end. Raises GraftError: it is another user's."""
    pid = job.pid if job.cluster == "debug" else _innermost(job)
    # submitit's controller passes SIGTERM on to its tasks, and kills them on SIGINT; it does not know SIGUSR2
    try:
        os.kill(pid, signal.SIGINT if now else signal.SIGTERM)
    except ProcessLookupError:  # it has just ended
        return
    except OSError as error:
        raise GraftError(f"process {pid} cannot be signalled: {error.strerror}") from error


def _innermost(job: Job) -> int:
    """submitit's controller, which is a child of the job's process where setup lines need a shell."""
    number = int(job.job_id)
    try:
        children = psutil.Process(number).children()
        return next((one.pid for one in children if CONTROLLER in one.cmdline()), number)
    except psutil.Error:
        return number
