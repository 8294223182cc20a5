"""How long a run is and what its learning rate is at each step."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import OptimConfig
from .optim import learning_rate, peak_learning_rate


@dataclass(frozen=True)
class Schedule:
    """Steps are optimiser steps; each takes `accum` batches. An epoch's left-over batches are not used."""

    accum: int
    steps_per_epoch: int
    total_steps: int
    peak: float
    minimum: float
    warmup_steps: float
    effective_batch: int

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        return learning_rate(
            step,
            peak=self.peak,
            minimum=self.minimum,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
        )


def plan_schedule(config: OptimConfig, batches_per_epoch: int, batch_size: int, world_size: int) -> Schedule:
    """The schedule of a run whose loader gives `batches_per_epoch` batches to each process."""
    accum = min(config.accum_iter, batches_per_epoch)
    steps_per_epoch = batches_per_epoch // accum
    peak, effective = peak_learning_rate(config, batch_size, world_size)
    return Schedule(
        accum=accum,
        steps_per_epoch=steps_per_epoch,
        total_steps=config.max_steps or config.epochs * steps_per_epoch,
        peak=peak,
        minimum=min(config.min_lr, peak),
        warmup_steps=config.warmup_epochs * steps_per_epoch,
        effective_batch=effective,
    )
