"""Compute the targets that a cache lacks, side by side with other processes that compute the same ones."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from ..data.loaders import TrainLoader
from ..data.sampler import BatchRequest
from .shard_lock import ShardLock
from .target_rows import PIXELS, add_checksums
from .target_shards import Shard, TargetShards

POLL = 1.0
"""Seconds between two looks at the shards that other processes compute."""
Teach = Callable[[Tensor], dict[str, Tensor]]


def fill(
    cache: TargetShards,
    todo: Sequence[Shard],
    loader: TrainLoader,
    teach: Teach,
    *,
    stopped: Callable[[], bool],
    moved: Callable[[int], object],
    kept: Callable[[], object],
) -> None:
    """Write the shards of `todo`, each by one of the processes that call this; return when all are there.

    Batches are as large as those of the run: the last one of a shard is padded, because sums over another number of
    images may be rounded otherwise.

    Args:
        cache: Where they are written.
        todo: The shards that are missing or damaged.
        loader: The training images.
        teach: Gives the targets of images.
        stopped: Whether to leave early.
        moved: Called after each batch with the number of its images, and with 0 after each look while others compute.
        kept: Called after each shard that this process has written.
    """
    left = list(todo)
    while left and not stopped():
        claims = _Claims(cache, left, loader.batch_size)
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
            time.sleep(POLL)


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
    busy: list[Shard] = field(default_factory=list)
    """Those that another process computes."""
    asked: deque[tuple[Shard, int]] = field(default_factory=deque)
    """The shard and the number of images of each batch that was asked for and has not come."""
    held: dict[Shard, ShardLock] = field(default_factory=dict)

    def requests(self) -> Iterator[BatchRequest]:
        for shard in self.todo:
            lock = ShardLock.take(self.cache.path(shard))
            if lock is None:
                self.busy.append(shard)
                continue
            self.held[shard] = lock
            if self.cache.fault(shard) is None:
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
