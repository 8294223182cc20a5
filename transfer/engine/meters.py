"""Mean losses and a check for non-finite losses, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from .parallel import local


def stacked(losses: Mapping[str, Tensor]) -> Tensor:
    """Return the scalars of `losses` as one detached float32 vector, in their order."""
    return torch.stack([loss.detach().float() for loss in losses.values()])


class Meters:
    """Running sums of named scalars. They are in the saved state, because a restart may interrupt an interval."""

    def __init__(self, device: torch.device) -> None:
        # float64: an epoch adds thousands of values. MPS has no float64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Clear the sums."""
        self.count = 0
        self.names: tuple[str, ...] = ()
        self.sums = torch.zeros(0, dtype=self._dtype, device=self._device)

    @torch.no_grad()
    def add(self, names: Sequence[str], values: Tensor) -> None:
        """Add one value of each named loss, the same names each time, without waiting for the device."""
        if not self.count:
            self.names, self.sums = tuple(names), torch.zeros_like(values, dtype=self._dtype)
        self.count += 1
        self.sums = self.sums + values

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over steps and processes. Synchronizes."""
        if not self.count:
            return {}
        sums = accelerator.reduce(self.sums, reduction="sum").tolist()
        total = self.count * accelerator.num_processes
        return {name: value / total for name, value in zip(self.names, sums, strict=True)}

    def load(self, count: int, names: Sequence[str], sums: Tensor) -> None:
        """Restore `count`, `names` and `sums`."""
        self.count, self.names = count, tuple(names)
        self.sums = sums.to(self._device, self._dtype)


NEVER = 2**62


class LossHealth:
    """The first step at which each part of the loss was not finite, kept on the device until asked for."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._first: Tensor | None = None

    @torch.no_grad()
    def record(self, step: int, names: Sequence[str], values: Tensor) -> None:
        """Record which of `values` are not finite at `step`, without waiting for the device."""
        if self._first is None:
            self._names, self._first = tuple(names), torch.full_like(values, NEVER, dtype=torch.int64)
        self._first = torch.where(torch.isfinite(values), self._first, self._first.clamp(max=step))

    def failures(self, accelerator: Accelerator) -> dict[str, int]:
        """Return the first step of each failed part on any process, equal on all processes. Synchronizes."""
        if self._first is None:
            return {}
        first = self._first.clone()
        if accelerator.num_processes > 1:
            dist.all_reduce(first, op=dist.ReduceOp.MIN)
        return {name: step for name, step in zip(self._names, first.tolist(), strict=True) if step < NEVER}


def describe(failures: Mapping[str, int]) -> str:
    """Describe the first failed step and its parts. Name the total only if no part explains it."""
    step = min(failures.values())
    parts = [name for name, first in failures.items() if first == step]
    explained = [name for name in parts if name not in ("loss", "transfer")]
    return f"the loss is not finite at step {step} (in {', '.join(explained or parts)})"


@torch.no_grad()
def weights_finite(model: nn.Module, accelerator: Accelerator) -> bool:
    """Return whether every floating-point weight is finite on all processes. Synchronizes; call it before a save.

    A gradient can overflow while the loss is finite: the weights are then bad one step before the loss.
    """
    held = [local(tensor) for tensor in model.state_dict().values()]
    floats = [tensor for tensor in held if tensor.is_floating_point() and tensor.numel()]
    bad = torch.zeros((), device=accelerator.device)
    if floats:
        norms = torch.stack(torch._foreach_norm(floats, ord=float("inf")))
        bad = (~torch.isfinite(norms)).any().float()
    return float(accelerator.reduce(bad, reduction="sum")) == 0
