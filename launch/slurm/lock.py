"""One submission into a folder at a time, from whatever shell or login node."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from ...models.errors import ConfigError
from ..hints import hint

logger = logging.getLogger(__name__)
_mine: set[Path] = set()
"""Folders that this process submits to."""
FILE = ".submitting"
WAIT = 60.0
"""Seconds that a second submission waits for the first."""
_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)
"""What a file system says that is told not to lock; of one that cannot, filelock knows by itself."""


@contextmanager
def submitting(folder: Path, wait: float = WAIT) -> Iterator[None]:
    """Keeps every other submission out of `folder`, that of a run, a sweep or a comparison.

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
    """Whether another command is at it, on whatever machine."""
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
