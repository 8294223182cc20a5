"""A lock of one file among the processes that may write it; the system frees it when its process dies."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import BinaryIO

from ...checkpoints.atomic import WriteFailedError, write_text

POLL = 0.05
"""Seconds between two looks at a file that another process writes."""


class ShardLock:
    """The right to write `path`, held until `free`."""

    def __init__(self, path: Path, file: BinaryIO | None) -> None:
        self._path = path
        self._file = file

    @classmethod
    def take(cls, path: Path) -> ShardLock | None:
        """Return the lock; None where another process has it. A file system without locks lets everybody in.

        Raises WriteFailedError: nothing can be written beside `path`.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return cls(path, None)
        own = path.with_name(f".{path.name}.lock")
        try:
            own.parent.mkdir(parents=True, exist_ok=True)
            file = own.open("ab")
        except OSError as error:
            raise WriteFailedError(
                f"transfer.cache: {path} is missing or damaged, and cannot be written ({error.strerror}): let someone "
                "who may write there compute the targets first, or name another folder"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            return cls(own, file)
        if not _is_same(own, file):  # its holder removed it meanwhile
            file.close()
            return None
        return cls(own, file)

    def free(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()


def write_once(path: Path, text: str) -> None:
    """Write a file that several processes may write at once, all the same text. Raise WriteFailedError."""
    while not path.exists():
        lock = ShardLock.take(path)
        if lock is None:
            time.sleep(POLL)
            continue
        try:
            if not path.exists():
                write_text(path, text)
        finally:
            lock.free()


def _is_same(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False
