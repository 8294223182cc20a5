"""One run on any number of processes: what a step sees stays the same, and is divided among the processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from ...models.errors import ConfigError, Json, counted
from ..config import RunConfig
from ..data.loaders import TrainLoader
from .build import Parts
from .optim import Schedule, plan_schedule
from .resume_check import Position, check_same_classes, check_same_weights


@dataclass(frozen=True)
class GlobalBatch:
    """The batch of an optimizer step, the same for the whole life of a run."""

    processes: int
    """Number of processes that the run was started on."""
    batch_size: int
    """Images of one batch: `data.batch_size`, or less if the data set is small."""
    micro_batches: int
    """Batches of a step, over all processes."""
    steps_per_epoch: int

    @property
    def images(self) -> int:
        """Return the images of a step."""
        return self.batch_size * self.micro_batches

    def meta(self) -> dict[str, int]:
        """Return the fields as JSON."""
        return asdict(self)

    def schedule(self, config: RunConfig, processes: int) -> Schedule:
        """Return the schedule of `config`, the settings at the start of the run; `processes` now share each step."""
        batches = self.steps_per_epoch * self.micro_batches // self.processes
        first = plan_schedule(config.optim, batches, config.data.batch_size, self.processes)
        return replace(first, accum=self.micro_batches // processes)


def settle(
    config: RunConfig, parts: Parts, processes: int, saved: Json | None
) -> tuple[RunConfig, GlobalBatch]:
    """Return the settings and the batch of a built run; if it resumes, those that it was started with.

    `saved` is the meta part of the state that it resumes from.

    Raises ConfigError: the run was started with other classes or weights, or as `check_spread`.
    """
    if saved is None:
        return config, first_batch(config, parts.train_loader, processes)
    check_same_classes(saved, parts.plan.label_names, config.output_dir)
    check_same_weights(saved, parts.origins, parts.plan.meta(), config.output_dir)
    return as_started(config, saved), global_batch(config, parts.train_loader, processes, saved)


def global_batch(config: RunConfig, loader: TrainLoader, processes: int, saved: Json | None) -> GlobalBatch:
    """Return the batch of a run that starts, or that resumes from a state with the meta part `saved`.

    Raises ConfigError: as `check_spread`.
    """
    if saved is None:
        return first_batch(config, loader, processes)
    batch = GlobalBatch(**saved["global_batch"])
    check_spread(batch, saved, Position(**saved["position"]), config, loader, processes)
    return batch


def first_batch(config: RunConfig, loader: TrainLoader, processes: int) -> GlobalBatch:
    """Return the batch of a run that starts now."""
    accum = min(config.optim.accum_iter, loader.batches_per_epoch)
    steps = loader.batches_per_epoch // accum
    return GlobalBatch(processes, loader.batch_size, accum * processes, steps)


def as_started(config: RunConfig, saved: Json) -> RunConfig:
    """Return `config` with the `optim.accum_iter` at the start of the run, which determines the schedule."""
    accum = saved["config"]["optim"]["accum_iter"]
    return config.model_copy(update={"optim": config.optim.model_copy(update={"accum_iter": accum})})


def check_spread(
    batch: GlobalBatch,
    saved: Json,
    position: Position,
    config: RunConfig,
    loader: TrainLoader,
    processes: int,
) -> None:
    """Raise ConfigError unless `processes` can reproduce the global batch of the run.

    The message names valid numbers of processes, or the setting that does not fit them.
    """
    before = saved["world_size"]
    fitting = [
        count
        for count in range(1, batch.micro_batches + 1)
        if batch.micro_batches % count == 0
        and _batch_size(config.data.batch_size, loader, count) == batch.batch_size
    ]
    if processes not in fitting:
        raise ConfigError(
            f"the run in {config.output_dir} takes {counted(batch.micro_batches, 'batch')} of {batch.batch_size} "
            f"images a step, which {counted(processes, 'process')} cannot share: use {_listed(fitting)}, or another "
            "output_dir"
        )
    accum, started = batch.micro_batches // processes, saved["config"]["optim"]["accum_iter"]
    if config.optim.accum_iter not in (started, accum):
        valid = " or ".join(str(value) for value in dict.fromkeys((started, accum)))
        raise ConfigError(
            f"optim.accum_iter={config.optim.accum_iter}, but the run in {config.output_dir} was started with "
            f"{started}, and {counted(processes, 'process')} take {accum} for its batch of {batch.images} images: "
            f"give {valid}, or another output_dir"
        )
    if loader.streamed and processes != before and 0 < position.epoch_step < batch.steps_per_epoch:
        raise ConfigError(
            f"the run in {config.output_dir} is in the middle of epoch {position.epoch} of a streamed data set, "
            f"of which {counted(processes, 'process')} would read other parts than the {before} that started it: "
            f"use {before} to the end of the epoch, or another output_dir"
        )
    if not loader.streamed and loader.num_samples // batch.images != batch.steps_per_epoch:
        raise ConfigError(
            f"split {config.data.train_split!r} has {loader.num_samples} images, which are not the "
            f"{batch.steps_per_epoch} steps an epoch of the run in {config.output_dir}: "
            "give the images that it was started with, or another output_dir"
        )


def describe(batch: GlobalBatch, before: int, processes: int) -> str:
    """Describe what another number of processes changes, and what it does not."""
    now, then = batch.micro_batches // processes, batch.micro_batches // before
    return (
        f"continues on {counted(processes, 'process')} with {counted(now, 'batch')} a step in place of "
        f"{before} with {then}; the global batch stays {batch.images}"
    )


def _batch_size(setting: int, loader: TrainLoader, processes: int) -> int:
    """Return the images of a batch if `processes` share the data set of `loader`."""
    return setting if loader.streamed else min(setting, loader.num_samples // processes)


def _listed(counts: list[int]) -> str:
    *others, last = counts
    words = f"{', '.join(map(str, others))} or " if others else ""
    return f"{words}{counted(last, 'process')}"
