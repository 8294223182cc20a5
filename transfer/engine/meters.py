"""Means of the losses over an interval, summed on the device so that a step never waits for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor


def stacked(losses: Mapping[str, Tensor]) -> Tensor:
    """The scalars of `losses` as one detached float32 vector, in their order."""
    return torch.stack([loss.detach().float() for loss in losses.values()])


class Meters:
    """Running sums of named scalars. Part of the saved state, so that an interval may be cut by a restart."""

    def __init__(self, device: torch.device) -> None:
        # float64: an epoch adds thousands of values. MPS has no float64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.count = 0
        self.names: tuple[str, ...] = ()
        self.sums = torch.zeros(0, dtype=self._dtype, device=self._device)

    @torch.no_grad()
    def add(self, names: Sequence[str], values: Tensor) -> None:
        """Adds one value of each named loss, the same names each time. Does not wait for the device."""
        if not self.count:
            self.names, self.sums = tuple(names), torch.zeros_like(values, dtype=self._dtype)
        self.count += 1
        self.sums = self.sums + values

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over steps and processes. Synchronises."""
        if not self.count:
            return {}
        sums = accelerator.reduce(self.sums, reduction="sum").tolist()
        total = self.count * accelerator.num_processes
        return {name: value / total for name, value in zip(self.names, sums, strict=True)}

    def load(self, count: int, names: Sequence[str], sums: Tensor) -> None:
        """Puts back what `count`, `names` and `sums` were."""
        self.count, self.names = count, tuple(names)
        self.sums = sums.to(self._device, self._dtype)
