"""Capture, save and restore the state of a run. All processes take part; only the first one writes.

One process and DDP write one file, in the first process. Under FSDP2 each process writes its shards while the training
continues. Either is restored on any number of processes, sharded or not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...checkpoints.state import StateFolder, TrainingState
from ...checkpoints.state_shards import Saving, ShardWriter, read_into
from ...checkpoints.weight_files import read_pieces
from ...models.converted import is_mark
from ...models.errors import CheckpointError, GraftError, Json, JsonDict
from ..config import RunConfig
from .elastic import GlobalBatch
from .optim import WeightAverage
from .parallel import PATIENCE, from_first, gather, gathered, placed_like, raise_together, read_once
from .resume_check import Position, settings
from .runlog import Meters, RunLog
from .students import StudentPlan
from .tasks import Task

FORMAT = 1
Tensors = dict[str, Tensor]


@dataclass
class RunState:
    """Everything that changes in a run; it is captured at a step boundary and restored."""

    config: RunConfig
    accelerator: Accelerator
    group: dist.ProcessGroup | None
    folder: StateFolder
    task: Task
    plan: StudentPlan
    model: nn.Module
    """The task, wrapped for its processes, which a step calls."""
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    meters: Mapping[str, Meters]
    log: RunLog
    batch: GlobalBatch
    origins: JsonDict
    """The sources of the teacher and of the initial weights."""
    n_parameters: int
    """Trainable parameters, counted after freezing and before sharding."""
    last_step: int | None = None
    """The step of the newest state on the disk."""

    def __post_init__(self) -> None:
        self._saving: Saving | None = None
        self._saved_step: int | None = None
        self._copies: Tensors = {}
        if self.config.engine.fsdp:
            self._background = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
            self._incoming = gather(self.folder.incoming, self.group)[0]

    def save(self, position: Position, *, best: bool = False, last: bool = True) -> None:
        """Write `last` (the one before becomes `previous`) and, if asked, `best`.

        A sharded state is written while the training continues, until `wait`. A disk error is raised on every process,
        and existing states stay intact.
        """
        if self.config.engine.fsdp:
            self._save_shards(position, best=best, last=last)
            return
        state = self.capture(position)
        error: GraftError | None = None
        if self.accelerator.is_main_process:
            try:
                self.log.sync()
                if best:
                    self.folder.save_best(state)
                if last:
                    self.folder.save(state, self.config.engine.keep_states, position.step)
            except GraftError as failure:
                failure.exit_code = 1
                error = failure
        raise_together(error, self.group)
        if last:
            self.last_step = position.step

    def _save_shards(self, position: Position, *, best: bool, last: bool) -> None:
        self.wait()
        state = self.capture(position, dict)
        if self.accelerator.is_main_process:
            self.log.sync()
        keep, step = self.config.engine.keep_states, position.step
        writer = ShardWriter(
            state.tensors,
            self._incoming,
            state.meta,
            partial(self.folder.commit, last=last, best=best, keep=keep, step=step),
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self._copies,
        )
        self._saving = Saving(writer, self._background)
        self._saved_step = step if last else self.last_step

    def wait(self) -> None:
        """Wait until a sharded state is on the disk. Raises on every process what `save` does."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.wait()
            self.last_step = self._saved_step

    def capture(
        self, position: Position, take: Callable[[Mapping[str, Tensor]], Tensors] | None = None
    ) -> TrainingState:
        """Return the state at this boundary, with tensors as `take` gives them; by default, gathered.

        All processes take part; gathered, only the first one's is complete.
        """
        take = take or partial(gathered, keep=self.accelerator.is_main_process)
        tensors = take(collect_weights(self.task.saved, self.average))
        slots, counters, numbers = collect_optimizer(self.task, self.optimizer)
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
        return TrainingState({**tensors, **take(slots), **counters, **sums}, meta)

    def meta(self, position: Position) -> JsonDict:
        """Return the description of the run, as JSON, for states and for the students written at the end."""
        return {
            "format": FORMAT,
            "version": version("graftvit"),
            "config": settings(self.config),
            "student": self.plan.meta() | self.task.described,
            "origins": self.origins,
            "position": position.meta(),
        }

    def restore(self, state: TrainingState) -> None:
        """Restore everything from `state`, of which other processes than the first one have the outline."""
        if state.folder is not None:
            state = self._read_shards(state, state.folder)
        tensors, group = state.tensors, self.group
        restore_optimizer(tensors, state.meta["optimizer_numbers"], self.task, self.optimizer, group)
        restore_weights(tensors, self.task.saved, self.average, group)
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
            group=self.group,
        )

    def _read_shards(self, state: TrainingState, folder: Path) -> TrainingState:
        """Return a state of shards with tensors that are sharded as those of this run; each process reads its own."""
        pieces, _ = read_once(lambda: read_pieces(folder), self.group)
        own = {**collect_weights(self.task.saved, self.average), **dict(self.task.named_parameters())}
        places: Tensors = {}
        for name, outline in state.tensors.items():
            like = own.get(name.removeprefix("optimizer.").partition("|")[0])
            if isinstance(like, DTensor) and like.shape == outline.shape:
                places[name] = torch.empty_like(like, dtype=outline.dtype)
            else:
                places[name] = torch.empty(outline.shape, dtype=outline.dtype)
        read_into(places, folder, pieces, self.group)
        return TrainingState(places, state.meta)


def position_of(state: TrainingState) -> Position:
    """Return the position of the run in `state`."""
    return Position(**state.meta["position"])


def collect_weights(module: nn.Module, average: WeightAverage | None) -> Tensors:
    """Return `student.…`, projectors and `ema.…`, sharded as they are."""
    tensors = dict(module.state_dict())
    if average is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in average.average.items()}
    return tensors


@torch.no_grad()
def restore_weights(
    tensors: Mapping[str, Tensor],
    module: nn.Module,
    average: WeightAverage | None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Copy the weights back in place, so that compiled or sharded modules and the optimizer stay valid.

    Raises CheckpointError that names a tensor that is missing or has another shape.
    """
    for name, target in module.state_dict().items():
        target.copy_(_find(tensors, name, target, group))
    if average is not None:
        for name, target in average.average.items():
            target.copy_(_find(tensors, f"ema.{name}", target, group))


def _find(
    tensors: Mapping[str, Tensor], name: str, target: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Return a tensor of the state, placed like `target`."""
    found = tensors.get(name)
    if found is None:
        raise CheckpointError(f"the saved state has no {name!r}: it was written for another model")
    if found.shape != target.shape:
        raise CheckpointError(
            f"the saved state has {name!r} with shape {tuple(found.shape)}, "
            f"the model wants {tuple(target.shape)}"
        )
    placed = placed_like(found, target, group)
    if is_mark(name) and not torch.equal(placed, target):
        raise CheckpointError(f"the saved state has {name!r} of another operator than the model")
    return placed


def collect_optimizer(task: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors, JsonDict]:
    """Return the tensors `optimizer.<parameter>|<slot>`, those of groups, and the slots that are plain numbers."""
    tensors: Tensors = {}
    numbers: JsonDict = {}
    for name, parameter in task.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}|{slot}"] = value
            elif value is not None:
                numbers[f"optimizer.{name}|{slot}"] = value
    counters, counts = _group_counters(optimizer)
    return tensors, counters, numbers | counts


CONFIGURED = frozenset({"params", "lr", "initial_lr", "lr_scale", "weight_decay"})
"""What the configuration gives to a group of parameters."""


def _group_counters(optimizer: torch.optim.Optimizer) -> tuple[Tensors, JsonDict]:
    """Return what steps have written into the groups, such as the step of LAMB and Adan: `group.<index>|<key>`."""
    tensors: Tensors = {}
    numbers: JsonDict = {}
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key in CONFIGURED or key in optimizer.defaults:
                continue
            if isinstance(value, Tensor):
                tensors[f"group.{index}|{key}"] = value.detach().cpu()
            elif isinstance(value, int | float):
                numbers[f"group.{index}|{key}"] = value
    return tensors, numbers


def restore_optimizer(
    tensors: Mapping[str, Tensor],
    numbers: Json,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Restore the slots of each parameter, sharded like it. Groups come from the configuration, but for counters."""
    parameters = dict(task.named_parameters())
    slots = {key: value for key, value in tensors.items() if key.startswith(("optimizer.", "group."))}
    for key, value in {**slots, **numbers}.items():
        if key.startswith("group."):
            index, name = key.removeprefix("group.").split("|", 1)
            value = from_first(value, group).clone() if isinstance(value, Tensor) else value
            optimizer.param_groups[int(index)][name] = value
            continue
        name, slot = key.removeprefix("optimizer.").rsplit("|", 1)
        parameter = parameters.get(name)
        if parameter is None:
            raise CheckpointError(
                f"the saved optimizer has a parameter {name!r} that the student does not have"
            )
        if isinstance(value, Tensor):
            # A slot with the parameter's shape lives beside it; a step counter stays a scalar on the CPU.
            beside = value.shape == parameter.shape
            value = (
                placed_like(value, parameter.detach(), group) if beside else from_first(value, group).clone()
            )
        optimizer.state[parameter][slot] = value


def capture_meters(meters: Mapping[str, Meters], group: dist.ProcessGroup | None) -> tuple[Tensors, JsonDict]:
    """Return the sums of every process, `meters.<rank>.…`, with their counts and names."""
    mine = {name: (meter.count, meter.names, meter.sums.cpu()) for name, meter in meters.items()}
    tensors: Tensors = {}
    counts: JsonDict = {}
    for rank, sums in enumerate(gather(mine, group)):
        for name, (count, names, values) in sums.items():
            tensors[f"meters.{rank}.{name}"] = values
            counts[f"meters.{rank}.{name}"] = {"count": count, "names": list(names)}
    return tensors, counts


def restore_meters(
    tensors: Mapping[str, Tensor],
    counts: Json,
    meters: Mapping[str, Meters],
    *,
    rank: int,
    processes: int,
    before: int,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Restore the sums of this process. If the number of processes changed, the first process gets all sums.

    The count is the number of batches that each of `processes` would have added in the same steps.
    """
    for name, meter in meters.items():
        keys = [f"meters.{number}.{name}" for number in range(before)]
        all_sums = [from_first(tensors[key], group) for key in keys]
        if processes == before:
            sums = all_sums[rank]
        else:
            sums = torch.stack(all_sums).sum(0)
            sums = sums if rank == 0 else torch.zeros_like(sums)
        saved = counts[keys[0]]  # all processes have added as many
        meter.load(saved["count"] * before // processes, saved["names"], sums)


def now() -> float:
    """Return the seconds of a monotonic clock."""
    return time.monotonic()


class SaveClock:
    """Ask for a save when `minutes` have passed since the last one; never if None.

    The clocks of processes differ, so one process asks and all agree (`StopSignals.agreed`).
    """

    def __init__(self, minutes: float | None) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        """Restart the minutes: a state was saved."""
        self._since, self._asked = now(), False

    def due(self) -> bool:
        """Return whether to ask for a save. It is True once, because the answer comes after the next boundary."""
        if self._seconds is None or self._asked or now() - self._since < self._seconds:
            return False
        self._asked = True
        return True
