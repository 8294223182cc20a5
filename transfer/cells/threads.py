"""The threads of torch, on which the rounding of its sums depends, and the cores for processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import joblib
import torch


def usable_cores() -> int:
    """Return the cores of this process: those of its task in a SLURM job, else those of the machine."""
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(granted) if granted.isdecimal() else int(joblib.cpu_count())


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Set torch's threads inside the block, so that its numbers do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
