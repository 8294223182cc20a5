"""Before the first step of a run with `transfer.cache`: compute what is missing, then let go of the teachers.

Several processes and several runs fill one cache side by side, each another object.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from ...checkpoints.atomic import WriteFailedError, write_shared
from ...checkpoints.files import digest, is_url
from ...checkpoints.provenance import digest_tensors
from ...models.errors import DataError, GraftError, JsonDict
from ..config import RunConfig
from ..data.loaders import TrainLoader
from ..data.sampler import BatchRequest, preserved
from ..data.shard_places import load, write
from ..methods.dual import DualViT
from ..target_shards import (
    PIXELS,
    Shard,
    TargetRows,
    TargetShards,
    add_checksums,
)
from . import deadline
from .build import Parts, build
from .dry_run import plan_targets
from .optim import Schedule
from .parallel import gather, raise_together, read_once, receive
from .resume_check import Position, commits_of
from .runlog import ProgressBar
from .scoring import teacher_top1
from .signals import StopSignals
from .tasks import TransferTask

logger = logging.getLogger(__name__)
Note = dict[str, float | None]
KEPT_TARGETS = "targets.txt"
"""The file of a run folder that names its cache, written again for each shard that the run adds to it."""


def prepare_targets(
    config: RunConfig,
    parts: Parts,
    accelerator: Accelerator,
    group: dist.ProcessGroup | None,
    schedule: Schedule,
    position: Position,
    signals: StopSignals,
) -> None:
    """Fill the cache of a run where it has one, and dismiss the teachers. A stop signal ends it early.

    All processes must call it; each computes a part of what is missing, and so do other runs with the same targets.
    An object that a step finds missing or damaged is computed again by teachers that are loaded again.

    Raises ConfigError: the targets are too large. WriteFailedError: they cannot be written.
    """
    cache = parts.targets
    if cache is None or not isinstance(parts.task, TransferTask):
        return

    def find() -> list[Shard]:
        size = plan_targets(config, parts, cache, schedule, position)
        logger.info("teacher targets: %s", size.describe())
        cache.open()
        return size.todo

    todo = read_once(find, group)
    wanted = config.engine.evaluate_teacher and position.step == 0 and parts.eval_loader is not None
    note: Note | None = None
    with preserved():
        if todo:
            _place(parts, accelerator, group)
            _fill_by_all(config, parts, parts.task.dual, accelerator, group, cache, todo, signals)
        if any(gather(signals.received is not None, group)):
            return
        if wanted:
            path = f"{cache.folder}/teacher_top1-{_digest_of_test(parts, group)}.json"
            note = gather(_read_note(path), group)[0]
        if wanted and note is None:
            _place(parts, accelerator, group)
            note = {"teacher_top1": teacher_top1(parts, accelerator)}
            if accelerator.is_main_process:
                _keep_note(path, note)
    parts.cached_top1 = (note or {}).get("teacher_top1") if wanted else None
    parts.rows = TargetRows(cache, Refill(config, parts.origins, cache.folder, accelerator))
    parts.task.dual.dismiss()


@dataclass
class Refill:
    """Computes an object of targets again, in the middle of a run, by teachers that are loaded for it and then stay.

    It holds nothing of the run, which holds it: loader processes end with the last reference to their loader.
    """

    config: RunConfig
    origins: JsonDict
    folder: str
    accelerator: Accelerator

    def __call__(self, shard: Shard) -> None:
        """Raise DataError: the teachers are others than when the run began. WriteFailedError: a disk is full."""
        with preserved():
            loader, cache, dual = self.built
            fill(
                cache,
                [shard],
                loader,
                _teach(dual, cache, self.accelerator),
                moved=lambda images: deadline.moved(),
                again=True,
            )

    @cached_property
    def built(self) -> tuple[TrainLoader, TargetShards, DualViT]:
        """The images, the cache and its teachers, on the device."""
        again = build(self.config, commits=commits_of({"origins": self.origins}))
        cache, dual = again.targets, again.task.taught_by
        if cache is None or dual is None or cache.folder != self.folder:
            raise DataError(
                "transfer.cache lacks targets, and the teacher is another one than when the run began: start the run "
                "again"
            )
        return again.train_loader, cache, dual.to(self.accelerator.device)


def _teach(
    dual: DualViT, cache: TargetShards, accelerator: Accelerator
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return what gives the targets of images, in the form in which they are kept."""

    def teach(images: Tensor) -> dict[str, Tensor]:
        with accelerator.autocast():
            return cache.form.pack(dual.teach(images.to(accelerator.device, non_blocking=True)))

    return teach


def _place(parts: Parts, accelerator: Accelerator, group: dist.ProcessGroup | None) -> None:
    """Move the task and its teachers to the device."""
    for teacher in parts.teachers.values():
        receive(teacher.model, group, accelerator.device)
    parts.task.to(accelerator.device)


def _fill_by_all(
    config: RunConfig,
    parts: Parts,
    dual: DualViT,
    accelerator: Accelerator,
    group: dist.ProcessGroup | None,
    cache: TargetShards,
    todo: list[Shard],
    signals: StopSignals,
) -> None:
    processes = int(accelerator.num_processes)
    own = len(todo) * int(accelerator.process_index) // processes
    if is_url(cache.root):  # no locks: runs begin at different places, and meet seldom
        own = (own + int(digest({"run": str(config.output_dir)}), 16)) % len(todo)
    shown = accelerator.is_main_process and config.engine.progress
    error: GraftError | None = None
    with ProgressBar(sum(shard.size for shard in todo), shown=shown, name="teacher targets") as bar:

        def moved(images: int) -> None:
            deadline.moved()
            bar.advance(images * processes)

        try:
            fill(
                cache,
                todo[own:] + todo[:own],
                parts.train_loader,
                _teach(dual, cache, accelerator),
                stopped=lambda: signals.received is not None,
                moved=moved,
                kept=lambda: write_shared(
                    config.output_dir / KEPT_TARGETS, f"{cache.folder}\n".encode(), replace=True
                ),
            )
        except GraftError as failure:
            error = failure
    raise_together(error, group)


def _digest_of_test(parts: Parts, group: dist.ProcessGroup | None) -> str:
    """Return a digest of what a teacher's accuracy depends on, beside its identity: pixels, targets, names of classes.

    The sum of the images' own digests depends on no order, and so on no number of processes.
    """
    loader, teacher = parts.eval_loader, parts.teacher
    if loader is None or teacher is None or not teacher.has_head:
        return "none"
    total = 0
    for images, targets, valid in loader:
        deadline.moved()
        for image, target in zip(images[valid], targets[valid], strict=True):
            total += int(digest_tensors({"image": image, "target": target}), 16)
    return digest(
        {"images": sum(gather(total, group)), "classes": loader.class_names, "names": teacher.label_names}
    )


def _keep_note(place: str, note: Note) -> None:
    """Write the teacher's accuracy. A cache that this user may only read stays as it is."""
    try:
        write(place, json.dumps(note).encode())
    except WriteFailedError as error:
        logger.warning("transfer.cache does not keep the teacher's accuracy: %s", error.__cause__ or error)


def _read_note(place: str) -> Note | None:
    """Return the accuracy that was measured before; None without a note that can be read."""
    try:
        top1 = json.loads(load(place) or b"")["teacher_top1"]
        return {"teacher_top1": None if top1 is None else float(top1)}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


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


# The objects that a cache lacks, each computed by one of the processes that lack it.

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
