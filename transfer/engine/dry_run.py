"""The dry run: build a run without weights, and check everything that its first step checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...checkpoints.state import StateFolder
from ...models.errors import GraftError, Json
from ..config import RunConfig
from ..data.loaders import AbsentTrainLoader
from ..staging import check_stage
from .build import Parts, build
from .cached_targets import CacheSize, Footprint, plan_targets, rehearse, views_of
from .elastic import GlobalBatch, settle
from .optim import Schedule
from .parallel import check_placement
from .resume_check import Position, as_begun, check_length, check_same_run, commits_of, refuse_existing


@dataclass(frozen=True)
class DryRun:
    """The parts of a run, without weights."""

    config: RunConfig
    """The settings; if the run resumes, those that it was started with."""
    parts: Parts
    processes: int
    saved: Json | None
    """The meta part of the state that the run resumes from; None for a new run."""
    batch: GlobalBatch | None
    """Images of a step; None if the training set is not on this machine."""
    footprint: Footprint
    targets: CacheSize | None = None
    """Content of `transfer.cache`; None without a cache, or if the training set is not on this machine."""
    views: Sequence[int] = ()
    """Views of the training images that the run shows; none if the training set is not on this machine."""

    @property
    def schedule(self) -> Schedule | None:
        """Images of a step; None if the training set is not on this machine."""
        return None if self.batch is None else self.batch.schedule(self.config, self.processes)

    @property
    def absent(self) -> GraftError | None:
        """Return why the training set could not be read, if it may be on another machine."""
        loader = self.parts.train_loader
        return loader.reason if isinstance(loader, AbsentTrainLoader) else None


def dry_run(config: RunConfig, processes: int, *, here: bool) -> DryRun:
    """Build `config` without weights for `processes` processes, and rehearse its first step.

    `here`: the run would be on this machine, whose device is known.

    Raises GraftError: the run would raise the same error before or in its first step.
    """
    on_cpu = config.engine.device == "cpu" or (here and not torch.cuda.is_available())
    check_placement(config, processes, on_cpu=on_cpu)
    if config.data.stage is not None:
        check_stage(config.data, here=here)
    saved = _saved(config)
    commits = {} if saved is None else commits_of(saved)
    config = config if saved is None else as_begun(config, saved)
    parts = build(config, world_size=processes, commits=commits, weights=False)
    batch = None
    if not isinstance(parts.train_loader, AbsentTrainLoader):
        config, batch = settle(config, parts, processes, saved)
    run = DryRun(config, parts, processes, saved, batch, rehearse(config, parts, here=here))
    if run.schedule is None:
        return run
    position = Position() if saved is None else Position(**saved["position"])
    check_length(position, run.schedule.total_steps)
    cache, targets = parts.targets, None
    if cache is not None:
        targets = plan_targets(config, parts, cache, run.schedule, position, here=here)
    views = views_of(config, run.schedule, position)
    kept = parts.train_loader.kept
    lack = kept.find_lack(views) if kept is not None and here else None
    if lack is not None:
        raise lack
    return replace(run, targets=targets, views=views)


def _saved(config: RunConfig) -> Json | None:
    """Return the meta part of the state in the run folder, if any. Raise GraftError if `config` cannot resume it."""
    refuse_existing(config.output_dir, config.engine.resume)
    if config.engine.resume == "never":
        return None
    saved = StateFolder(config.output_dir / "checkpoints").peek()
    if saved is not None:
        check_same_run(saved, config)
    return saved
