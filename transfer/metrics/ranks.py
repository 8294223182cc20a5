"""Sums and rows of all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """Return whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def summed(values: Tensor) -> Tensor:
    """Return the sum over all processes, on each of them."""
    if several():
        dist.all_reduce(values)
    return values


def gathered(rows: Tensor) -> Tensor:
    """Return the rows of all processes, by rank, on each of them; every process gives equally many."""
    if not several():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def first(values: Tensor) -> Tensor:
    """Return the values of the first process, on each of them: rounding may differ between devices."""
    if several():
        dist.broadcast(values, 0)
    return values


def exact(device: torch.device) -> torch.dtype:
    """Return the type that sums are kept in; MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
