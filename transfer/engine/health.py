"""Losses that are not finite: found on the device without waiting for it, reported by part and first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from .parallel import local

NEVER = 2**62


class LossHealth:
    """The first step at which each part of the loss was not finite, kept on the device until asked for."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._first: Tensor | None = None

    @torch.no_grad()
    def record(self, step: int, names: Sequence[str], values: Tensor) -> None:
        """Notes which of `values` are not finite at `step`. Does not wait for the device."""
        if self._first is None:
            self._names, self._first = tuple(names), torch.full_like(values, NEVER, dtype=torch.int64)
        self._first = torch.where(torch.isfinite(values), self._first, self._first.clamp(max=step))

    def failures(self, accelerator: Accelerator) -> dict[str, int]:
        """Part -> first step on any process; the same on all, so that they stop together. Synchronises."""
        if self._first is None:
            return {}
        first = self._first.clone()
        if accelerator.num_processes > 1:
            dist.all_reduce(first, op=dist.ReduceOp.MIN)
        return {name: step for name, step in zip(self._names, first.tolist(), strict=True) if step < NEVER}


def describe(failures: Mapping[str, int]) -> str:
    """The first step and the parts that failed at it. The total is named only where no part explains it."""
    step = min(failures.values())
    parts = [name for name, first in failures.items() if first == step]
    explained = [name for name in parts if name not in ("loss", "transfer")]
    return f"the loss is not finite at step {step} (in {', '.join(explained or parts)})"


@torch.no_grad()
def weights_finite(model: nn.Module, accelerator: Accelerator) -> bool:
    """Whether every floating-point weight is finite, on all processes. Synchronises; meant for before a save.

    A gradient can overflow while its loss is finite: the weights are then bad one step before a loss shows
    it.
    """
    held = [local(tensor) for tensor in model.state_dict().values()]
    floats = [tensor for tensor in held if tensor.is_floating_point() and tensor.numel()]
    bad = torch.zeros((), device=accelerator.device)
    if floats:
        norms = torch.stack(torch._foreach_norm(floats, ord=float("inf")))
        bad = (~torch.isfinite(norms)).any().float()
    return float(accelerator.reduce(bad, reduction="sum")) == 0
