"""Compute the targets that a cache lacks, side by side with other processes that compute the same ones."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..checkpoints.atomic import WriteFailedError
from ..checkpoints.files import is_url
from .data.loaders import TrainLoader
from .data.sampler import BatchRequest
from .target_shards import PIXELS, Shard, TargetShards, add_checksums

# A lock of one file among the processes that may write it; the system frees it when its process dies.


class ShardLock:
    """The right to write `path`, held until `free`."""

    def __init__(self, path: Path, file: BinaryIO | None) -> None:
        self._path = path
        self._file = file

    @classmethod
    def take(cls, place: str) -> ShardLock | None:
        """Return the lock; None where another process has it. A bucket, or a disk without locks, lets everybody in.

        Raises WriteFailedError: nothing can be written beside it.
        """
        path = Path(place)
        try:
            import fcntl
        except ImportError:  # Windows
            return cls(path, None)
        if is_url(place):
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


def _is_same(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


# Compute the targets that a cache lacks, side by side with other processes that compute the same ones.

FILL_POLL = 1.0
"""Seconds between two looks at the shards that other processes compute."""
Teach = Callable[[Tensor], dict[str, Tensor]]


def fill(
    cache: TargetShards,
    todo: Sequence[Shard],
    loader: TrainLoader,
    teach: Teach,
    *,
    stopped: Callable[[], bool] = lambda: False,
    moved: Callable[[int], object] = lambda images: None,
    kept: Callable[[], object] = lambda: None,
    again: bool = False,
) -> None:
    """Write the shards of `todo`, each by one of the processes that call this; return when all are there.

    Batches are as large as those of the run: the last one of a shard is padded, because sums over another number of
    images may be rounded otherwise.

    Args:
        cache: Where they are written.
        todo: The shards of which there is no object, or a damaged one.
        loader: The training images.
        teach: Gives the targets of images.
        stopped: Whether to leave early.
        moved: Called after each batch with the number of its images, and with 0 after each look while others compute.
        kept: Called after each shard that this process has written.
        again: Whether to write objects that are there, because they are damaged.
    """
    left = list(todo)
    while left and not stopped():
        claims = _Claims(cache, left, loader.batch_size, again)
        requests = claims.requests()
        first = next(requests, None)
        if first is not None:
            try:
                _compute(cache, claims, chain([first], requests), loader, teach, stopped, moved, kept)
            finally:
                claims.free()
        left = claims.busy
        if left and first is None:
            moved(0)
            time.sleep(FILL_POLL)


def _compute(
    cache: TargetShards,
    claims: _Claims,
    requests: Iterator[BatchRequest],
    loader: TrainLoader,
    teach: Teach,
    stopped: Callable[[], bool],
    moved: Callable[[int], object],
    kept: Callable[[], object],
) -> None:
    rows: list[dict[str, Tensor]] = []
    for batch in loader.fetch_apart(requests, add_checksums):
        shard, valid = claims.asked.popleft()
        if batch.images is not None:
            found = {**teach(batch.images), **(batch.beside or {})}
            rows.append({name: tensor[:valid].cpu() for name, tensor in found.items()})
        if sum(len(row[PIXELS]) for row in rows) == shard.size:
            cache.write(shard, {name: torch.cat([row[name] for row in rows]) for name in rows[0]})
            claims.done(shard)
            kept()
            rows = []
        moved(valid)
        if stopped():
            return


@dataclass
class _Claims:
    """The shards that this process computes, each claimed when the loader asks for its first batch."""

    cache: TargetShards
    todo: Sequence[Shard]
    batch_size: int
    again: bool
    busy: list[Shard] = field(default_factory=list)
    """Shards that another process computes."""
    asked: deque[tuple[Shard, int]] = field(default_factory=deque)
    """Shard and number of images of each batch that was requested and has not come."""
    held: dict[Shard, ShardLock] = field(default_factory=dict)

    def requests(self) -> Iterator[BatchRequest]:
        for shard in self.todo:
            lock = ShardLock.take(self.cache.place(shard))
            if lock is None:
                self.busy.append(shard)
                continue
            self.held[shard] = lock
            if not self.again and self.cache.holds(shard):
                self.done(shard)
                continue
            end = shard.first + shard.size
            for first in range(shard.first, end, self.batch_size):
                indices = tuple(range(first, min(first + self.batch_size, end)))
                padding = indices[-1:] * (self.batch_size - len(indices))
                self.asked.append((shard, len(indices)))
                yield BatchRequest(shard.view, first, indices + padding, len(indices))

    def done(self, shard: Shard) -> None:
        self.held.pop(shard).free()

    def free(self) -> None:
        for lock in self.held.values():
            lock.free()
        self.held.clear()
