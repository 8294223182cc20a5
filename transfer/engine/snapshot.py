"""The tensors of a run at a step boundary: weights, average, optimiser and meters, by flat names.

The format does not depend on how the run is spread: sharded tensors are gathered whole and sharded again on
the way back, so one process, DDP and FSDP2 write the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...models.errors import CheckpointError
from .ema import WeightAverage
from .meters import Meters
from .parallel import gather, gathered, placed_like

Tensors = dict[str, Tensor]


def capture_weights(module: nn.Module, average: WeightAverage | None, *, keep: bool) -> Tensors:
    """`student.…` (and projectors beside it) and `ema.…`, whole, where `keep`; all processes must call it."""
    tensors = dict(module.state_dict())
    if average is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in average.average.items()}
    return gathered(tensors, keep=keep)


@torch.no_grad()
def restore_weights(tensors: Mapping[str, Tensor], module: nn.Module, average: WeightAverage | None) -> None:
    """Copies the weights back in place, which a compiled or sharded module and its optimiser go on using.

    Raises CheckpointError that names what is missing or has another shape.
    """
    for name, target in module.state_dict().items():
        target.copy_(placed_like(_find(tensors, name, target), target))
    if average is not None:
        for name, target in average.average.items():
            target.copy_(placed_like(_find(tensors, f"ema.{name}", target), target))


def _find(tensors: Mapping[str, Tensor], name: str, target: Tensor) -> Tensor:
    found = tensors.get(name)
    if found is None:
        raise CheckpointError(f"the saved state has no {name!r}: it was written for another model")
    if found.shape != target.shape:
        raise CheckpointError(
            f"the saved state has {name!r} with shape {tuple(found.shape)}, "
            f"the model wants {tuple(target.shape)}"
        )
    return found


def capture_optimizer(
    task: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool
) -> tuple[Tensors, dict[str, Any]]:
    """`optimizer.<parameter>|<slot>` tensors, where `keep`, and the slots that are plain numbers."""
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    for name, parameter in task.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}|{slot}"] = value
            elif value is not None:
                numbers[f"optimizer.{name}|{slot}"] = value
    return gathered(tensors, keep=keep), numbers


def restore_optimizer(
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Puts the slots back beside their parameters, sharded like them; groups come from the configuration."""
    parameters = dict(task.named_parameters())
    slots = {key: value for key, value in tensors.items() if key.startswith("optimizer.")}
    for key, value in {**slots, **numbers}.items():
        name, slot = key.removeprefix("optimizer.").rsplit("|", 1)
        parameter = parameters.get(name)
        if parameter is None:
            raise CheckpointError(f"the saved optimiser knows a parameter {name!r} that the student has not")
        if isinstance(value, Tensor):
            # A slot with the parameter's shape lives beside it; a step counter stays a scalar on the CPU.
            value = (
                placed_like(value, parameter.detach()) if value.shape == parameter.shape else value.clone()
            )
        optimizer.state[parameter][slot] = value


def capture_meters(
    meters: Mapping[str, Meters], group: dist.ProcessGroup | None
) -> tuple[Tensors, dict[str, Any]]:
    """Sums of every process, `meters.<rank>.…`, and what they are sums of."""
    mine = {name: (meter.count, meter.names, meter.sums.cpu()) for name, meter in meters.items()}
    tensors: Tensors = {}
    counts: dict[str, Any] = {}
    for rank, sums in enumerate(gather(mine, group)):
        for name, (count, names, values) in sums.items():
            tensors[f"meters.{rank}.{name}"] = values
            counts[f"meters.{rank}.{name}"] = {"count": count, "names": list(names)}
    return tensors, counts


def restore_meters(
    tensors: Mapping[str, Tensor],
    counts: Mapping[str, Any],
    meters: Mapping[str, Meters],
    *,
    rank: int,
    processes: int,
    before: int,
) -> None:
    """Gives this process its sums back; of `before` other processes, all to the first and nothing to the others.

    The count is that of the batches that each of `processes` would have added for the same steps.
    """
    for name, meter in meters.items():
        keys = [f"meters.{number}.{name}" for number in range(before)]
        if processes == before:
            sums = tensors[keys[rank]]
        else:
            sums = torch.stack([tensors[key] for key in keys]).sum(0)
            sums = sums if rank == 0 else torch.zeros_like(sums)
        saved = counts[keys[0]]  # all processes have added as many
        meter.load(saved["count"] * before // processes, saved["names"], sums)
