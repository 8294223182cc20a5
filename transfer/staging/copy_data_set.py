"""Copying a data set to a folder: many files at once, with what is told on the way, and an end before the end."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ...models.errors import DataError
from ..config import DataConfig
from ..data.archives import unpack
from .source import THREADS, Key, Piece, Source, batched

logger = logging.getLogger(__name__)

CHUNK = 1 << 22
EVERY = 30.0
"""Seconds between two lines of progress."""


class StagingStoppedError(Exception):
    """The process was asked to stop while it copied or waited."""


def now() -> float:
    """Return seconds of a clock that never goes back."""
    return time.monotonic()


class Progress:
    """What is copied so far; a line now and then in the log, from whichever process copies."""

    def __init__(self, total: int, stopped: Callable[[], bool]) -> None:
        self.done, self.total, self._stopped = 0, max(1, total), stopped
        self._lock = threading.Lock()
        self._begin = self._told = now()

    def moved(self, count: int) -> None:
        """Count so many bytes more. Raises StagingStoppedError where the process is to stop."""
        with self._lock:
            self.done += count
            self._tell()
        if self._stopped():
            raise StagingStoppedError

    def _tell(self) -> None:
        time_now = now()
        if time_now - self._told < EVERY:
            return
        self._told = time_now
        share, speed = self.done / self.total, self.done / (time_now - self._begin)
        left = max(0, self.total - self.done) / max(1.0, speed)
        logger.warning(
            "data.stage on %s: %.0f %% of %s, %s/s, about %d s left",
            socket.gethostname(), 100 * min(1.0, share), in_words(self.total), in_words(int(speed)), left,
        )  # fmt: skip


def copy(source: Source, folder: Path, config: DataConfig, progress: Progress) -> None:
    """Fill `folder`. Raises DataError: a file cannot be read or written, or has changed; StagingStoppedError."""
    for place in source.folders:
        (folder / place).mkdir(parents=True, exist_ok=True)
    if source.packed:
        unpack(source.root, folder, config, progress.moved, room=progress.total)
        return
    first: dict[Key, Piece] = {}
    again = [piece for piece in source.pieces if first.setdefault(piece.key, piece) is not piece]
    with ThreadPoolExecutor(THREADS) as pool:
        for some in batched(first.values()):
            list(pool.map(lambda piece: _copy(piece, folder, progress), some))
    for piece in again:
        _repeat(folder, piece.place, first[piece.key].place, source.linked)
    for place, path in source.links.items():
        _made(folder / place).symlink_to(path)


def _copy(piece: Piece, folder: Path, progress: Progress) -> None:
    target = _made(folder / piece.place)
    try:
        with Path(piece.path).open("rb", buffering=0) as file, target.open("wb", buffering=0) as new:
            while chunk := file.read(CHUNK):
                new.write(chunk)
                progress.moved(len(chunk))
            size = new.tell()
    except PermissionError:  # one image that nobody may read is no reason to stop, staged or not
        with suppress(OSError):
            target.unlink()
        target.symlink_to(piece.path)
        return
    except OSError as error:
        where = error.filename or piece.path
        raise DataError(
            f"{where} cannot be copied to {folder} for data.stage: {error.strerror or error}"
        ) from error
    if size != piece.size:
        raise DataError(
            f"{piece.path} had {piece.size:,} bytes and {size:,} when it was copied for data.stage: start again when "
            "the data set is no longer written to"
        )


def _repeat(folder: Path, place: str, first: str, linked: frozenset[str]) -> None:
    """Repeat a file that is there under another name: by a link of the kind that it is in the source."""
    target = _made(folder / place)
    if place in linked or first in linked:
        target.symlink_to(os.path.relpath(folder / first, target.parent))
    else:
        target.hardlink_to(folder / first)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def in_words(count: float) -> str:
    """Return bytes, as in `12.3 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1024
    return f"{count:.4g} TiB"
