"""The random generators of a process (torch, numpy, Python): seeded for each batch, or left as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from .augment import seed_generators
from .sampler import STUDENT, derive_seed


def seed_batch(seed: int, epoch: int, position: int, device: torch.device) -> None:
    """Seed all generators for what a batch draws (stochastic depth, masks, sampled rows).

    `position` is that of its first sample in the epoch's order over all processes: the draws depend neither on what
    was drawn before nor on how many processes share a step. Does not wait for the device.
    """
    number = derive_seed(STUDENT, seed, epoch, position)
    seed_generators(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


@contextmanager
def preserved() -> Iterator[None]:
    """Leave the generators as they were, whatever the block draws.

    What is made at the start of a run (a student's fresh weights) must not depend on what is read or looked at
    meanwhile.
    """
    held = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(held[0])
        np.random.set_state(held[1])
        torch.set_rng_state(held[2])
