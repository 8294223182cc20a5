"""Writing and reading the state of a run. All processes take part; the first one touches the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from ...checkpoints.state import StateFolder, TrainingState
from ...models.errors import GraftError
from ..config import RunConfig
from .elastic import GlobalBatch
from .ema import WeightAverage
from .meters import Meters
from .parallel import raise_together
from .resume import Position, settings
from .runlog import RunLog
from .snapshot import (
    capture_meters,
    capture_optimizer,
    capture_weights,
    restore_meters,
    restore_optimizer,
    restore_weights,
)
from .students import StudentPlan
from .tasks import Task

FORMAT = 1


@dataclass
class Saver:
    """What changes in a run, captured at a step boundary and put back; one format however it is spread."""

    config: RunConfig
    accelerator: Accelerator
    group: dist.ProcessGroup | None
    folder: StateFolder
    task: Task
    plan: StudentPlan
    model: nn.Module
    """What a step calls: the task, wrapped for its processes."""
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    meters: Mapping[str, Meters]
    log: RunLog
    batch: GlobalBatch
    origins: dict[str, Any]
    """Where the teacher and the starting weights are from."""
    n_parameters: int
    """Trainable parameters, counted after freezing and before sharding."""
    last_step: int | None = None
    """The step of the newest state on the disk."""

    def save(self, position: Position, *, best: bool = False, last: bool = True) -> None:
        """Writes `last` (the one before becomes `previous`) and, if asked, `best`.

        A disk error is raised on every process, and the states that were there stay as they are.
        """
        state = self.capture(position)
        error: GraftError | None = None
        if self.accelerator.is_main_process:
            try:
                self.log.sync()
                if best:
                    self.folder.save_best(state)
                if last:
                    self.folder.save(state)
            except GraftError as failure:
                failure.exit_code = 1
                error = failure
        raise_together(error, self.group)
        if last:
            self.last_step = position.step

    def capture(self, position: Position) -> TrainingState:
        """The state at this boundary. All processes take part; only the first one's is whole."""
        keep = self.accelerator.is_main_process
        tensors = capture_weights(self.task.saved, self.average, keep=keep)
        slots, numbers = capture_optimizer(self.task, self.optimizer, keep=keep)
        sums, counts = capture_meters(self.meters, self.group)
        position.records = self.log.records
        scaler = self.accelerator.scaler
        meta = self.meta(position) | {
            "world_size": self.accelerator.num_processes,
            "global_batch": self.batch.meta(),
            "ema_updates": self.average.updates if self.average else 0,
            "optimizer_numbers": numbers,
            "meters": counts,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        return TrainingState({**tensors, **slots, **sums}, meta)

    def meta(self, position: Position) -> dict[str, Any]:
        """What a state and the students written at the end say of the run, as JSON."""
        return {
            "format": FORMAT,
            "config": settings(self.config),
            "student": self.plan.meta(),
            "origins": self.origins,
            "position": position.meta(),
        }

    def restore(self, state: TrainingState) -> None:
        """Everything as it was when `state` was captured."""
        restore_optimizer(state.tensors, state.meta["optimizer_numbers"], self.task, self.optimizer)
        restore_weights(state.tensors, self.task.saved, self.average)
        if self.average is not None:
            self.average.updates = int(state.meta["ema_updates"])
        if self.accelerator.scaler is not None and state.meta["scaler"]:
            self.accelerator.scaler.load_state_dict(state.meta["scaler"])
        self.last_step = position_of(state).step
        restore_meters(
            state.tensors,
            state.meta["meters"],
            self.meters,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            before=state.meta["world_size"],
        )


def position_of(state: TrainingState) -> Position:
    """Where the run stood."""
    return Position(**cast(dict[str, Any], state.meta["position"]))
