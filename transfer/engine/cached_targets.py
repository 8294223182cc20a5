"""Before the first step of a run with `transfer.cache`: compute what is missing, then let go of the teachers."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from ...checkpoints.atomic import WriteFailedError, write_shared
from ...checkpoints.files import read_json
from ...models.errors import GraftError, counted
from ..cache.cache_checks import check_size, gibibytes
from ..cache.filling import fill
from ..cache.shard_lock import write_once
from ..cache.target_key import describe_test_images, has_weights
from ..cache.target_rows import TargetRows
from ..cache.target_shards import Shard, TargetShards, digest_of
from ..config import RunConfig
from ..data.randomness import preserved
from ..methods.dual import DualViT
from . import deadline
from .build import Parts
from .optim import Schedule
from .parallel import gather, raise_together
from .progress import ProgressBar
from .rehearsal import target_bytes
from .resume_check import Position
from .scoring import teacher_top1
from .signals import StopSignals
from .tasks import TransferTask

logger = logging.getLogger(__name__)
Note = dict[str, float | None]
KEPT_TARGETS = "targets.txt"
"""The file of a run folder that names its cache, written again for each shard that the run adds to it."""


def views_of(config: RunConfig, schedule: Schedule, position: Position) -> list[int]:
    """Return the views that a run shows from a position to its end."""
    left = schedule.total_steps - position.step
    if left <= 0:
        return []
    epochs = -(-(position.epoch_step + left) // schedule.steps_per_epoch)
    count = max(1, config.data.views or 0)
    return sorted({(position.epoch + epoch) % count for epoch in range(epochs)})


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

    Raises ConfigError: the targets are too large. WriteFailedError: they cannot be written.
    """
    cache = parts.targets
    if cache is None or not isinstance(parts.task, TransferTask):
        return
    shards = cache.shards(views_of(config, schedule, position))
    todo = _missing(config, parts, accelerator, group, cache, shards)
    path = cache.folder / f"teacher_top1-{_digest_of_test(config, parts)}.json"
    note = gather(_read_note(path), group)[0]
    wanted = config.engine.evaluate_teacher and position.step == 0 and parts.eval_loader is not None
    with preserved():
        if todo:
            parts.task.to(accelerator.device)
            _fill(config, parts, parts.task.dual, accelerator, group, cache, todo, signals)
        if any(gather(signals.received is not None, group)):
            return
        if wanted and note is None:
            parts.task.to(accelerator.device)
            note = {"teacher_top1": teacher_top1(parts, accelerator)}
            if accelerator.is_main_process:
                _keep_note(path, note)
    parts.cached_top1 = (note or {}).get("teacher_top1") if wanted else None
    parts.train_loader.batches.beside = TargetRows(cache)
    parts.task.dual.dismiss()


def _missing(
    config: RunConfig,
    parts: Parts,
    accelerator: Accelerator,
    group: dist.ProcessGroup | None,
    cache: TargetShards,
    shards: list[Shard],
) -> list[Shard]:
    """Return the shards to compute, after a check of their size. Each process looks at a part of the files."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    todo = sorted({shard for part in gather(cache.unsound(shards[rank::processes]), group) for shard in part})
    error: GraftError | None = None
    if accelerator.is_main_process:
        try:
            size = size_of(config, parts, cache, shards, todo)
            logger.info("teacher targets: %s", size.describe())
            check_size(str(cache.root), config.transfer.cache_limit, size.whole, size.missing, here=True)
            cache.open()
        except GraftError as failure:
            error = failure
    raise_together(error, group)
    return todo


@dataclass(frozen=True)
class CacheSize:
    """What a run keeps, where, and how much of it is there."""

    cache: TargetShards
    shards: list[Shard]
    todo: list[Shard]
    whole: int
    """Bytes of all shards."""
    missing: int
    """Bytes of those to compute."""

    def describe(self) -> str:
        """Return it in words."""
        views = counted(len({shard.view for shard in self.shards}), "view")
        files = counted(len(self.shards), "file")
        if not has_weights(self.cache):
            where = f"{gibibytes(self.whole)} in {self.cache.root}"
            return (
                f"{self.cache.samples:,} images in {views}, {where}; the weights say whether they are there"
            )
        state = (
            f"{len(self.todo):,} of {files} to compute"
            if self.todo
            else f"{files}, complete: no teacher runs"
        )
        return f"{self.cache.samples:,} images in {views}, {gibibytes(self.whole)} in {self.cache.folder}: {state}"


def size_of(
    config: RunConfig, parts: Parts, cache: TargetShards, shards: list[Shard], todo: list[Shard]
) -> CacheSize:
    """Return the size of a run's shards; what is not there is counted by the shapes of the teachers' results."""
    if not todo:
        return CacheSize(cache, shards, todo, sum(cache.path(shard).stat().st_size for shard in shards), 0)
    each = target_bytes(config, parts)
    whole, missing = (each * sum(shard.size for shard in some) for some in (shards, todo))
    return CacheSize(cache, shards, todo, whole, missing)


def plan_targets(
    config: RunConfig, parts: Parts, schedule: Schedule, position: Position, *, here: bool
) -> CacheSize | None:
    """Return what `prepare_targets` would say; files are not read. Raises ConfigError: the targets are too large."""
    cache = parts.targets
    if cache is None:
        return None
    shards = cache.shards(views_of(config, schedule, position))
    known = has_weights(cache)
    todo = [shard for shard in shards if not known or not cache.path(shard).exists()]
    size = size_of(config, parts, cache, shards, todo)
    check_size(str(cache.root), config.transfer.cache_limit, size.whole, size.missing, here=here and known)
    return size


def _fill(
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

    def teach(images: Tensor) -> dict[str, Tensor]:
        with accelerator.autocast():
            return dual.teach(images.to(accelerator.device, non_blocking=True))

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
                teach,
                stopped=lambda: signals.received is not None,
                moved=moved,
                kept=lambda: write_shared(
                    config.output_dir / KEPT_TARGETS, f"{cache.folder}\n".encode(), replace=True
                ),
            )
        except GraftError as failure:
            error = failure
    raise_together(error, group)


def _digest_of_test(config: RunConfig, parts: Parts) -> str:
    if parts.eval_loader is None:
        return "none"
    return digest_of(describe_test_images(config, parts.spec, parts.eval_loader))


def _keep_note(path: Path, note: Note) -> None:
    """Write the teacher's accuracy. A cache that this user may only read stays as it is."""
    try:
        path.unlink(missing_ok=True)  # one that cannot be read
        write_once(path, json.dumps(note))
    except (OSError, WriteFailedError) as error:
        logger.warning("transfer.cache does not keep the teacher's accuracy: %s", error.__cause__ or error)


def _read_note(path: Path) -> Note | None:
    """Return the accuracy that was measured before; None without a note that can be read."""
    try:
        top1 = read_json(path)["teacher_top1"]
        return {"teacher_top1": None if top1 is None else float(top1)}
    except (GraftError, ValueError, KeyError, TypeError):
        return None
