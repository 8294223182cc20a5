"""Allow one submission into a folder at a time, from any shell or login node, and handle Ctrl-C during it.

A signal before the job is submitted ends the command. Between sbatch and the record of the job number, a signal waits.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from ...models.errors import ConfigError, GraftError
from ..say import hint

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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return _try(FileLock(path), wait)
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            return _try(SoftFileLock(path.with_suffix(".pid")), wait)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error


def _try(lock: BaseFileLock, wait: float) -> BaseFileLock | None:
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        return None
    return lock


_orders: list[bool] = []
"""One entry for each job that this process may have given to a scheduler."""
HELD = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


class InterruptedSubmissionError(GraftError):
    """A job that was submitted despite the signal; the exit code is the signal's."""

    def __init__(self, number: int, job: str, folder: Path) -> None:
        self.exit_code = 128 + number
        super().__init__(
            f"{signal.Signals(number).name} came while job {job} was being submitted, and it was: "
            f"`{hint('jobs', 'stop', folder)}` ends it"
        )


class NothingSubmittedError(GraftError):
    """Somebody has stopped a submission in time; the exit code is the signal's."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {name}: nothing was submitted")


class _Told(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Say that nothing was submitted where Ctrl-C or SIGTERM ends the block before the first order.

    Raises NothingSubmittedError.
    """
    if threading.current_thread() is not threading.main_thread():  # no other one may have handlers
        yield
        return
    _orders.clear()
    before = signal.getsignal(signal.SIGTERM)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _tell)
    try:
        yield
    except (KeyboardInterrupt, _Told) as told:
        if _orders:
            raise
        raise NothingSubmittedError(signal.SIGTERM if isinstance(told, _Told) else signal.SIGINT) from told
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(number: int, frame: FrameType | None) -> None:
    if not _orders:
        raise _Told
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def ordering() -> None:
    """Note that from now on a job may have been submitted."""
    _orders.append(True)


@contextmanager
def unbroken() -> Iterator[list[int]]:
    """Delay signals that would end this process; yield those that arrived.

    Use handlers, not a mask: a child would keep the mask for its whole life. An ignored signal stays ignored.
    """
    came: list[int] = []
    ordering()

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
