"""Which samples make which batch: a pure function of (seed, epoch, position), two integers to resume from.

A position is *global*: the place of a sample in the epoch's order over all ranks. A run that resumes on
another number of ranks continues the order where it stopped, and repeats or drops no sample.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import TypedDict

from .augment import seed_generators

Indices = npt.NDArray[np.int64]

ORDER, SAMPLE, MIXING, STUDENT = 0, 1, 2, 3
"""What a seed is for; kept apart so that the order of samples says nothing about their augmentation, nor that
about what the student draws."""


class Ranks(TypedDict, total=False):
    """A process of a run, and their number; by default the only one."""

    rank: int
    world_size: int


@dataclass(frozen=True)
class BatchRequest:
    """What a loader process needs to make one batch, wherever and whenever it runs."""

    epoch: int
    position: int  # global position of the first sample
    indices: tuple[int, ...]
    valid: int  # how many of the first indices count; the rest pads an evaluation batch


def derive_seed(*parts: int) -> int:
    """Return a 32-bit seed from non-negative integers; unlike a sum, near parts give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def epoch_order(size: int, seed: int, epoch: int, repeats: int = 1) -> Indices:
    """Return the order in which an epoch visits `size` samples: a permutation.

    With `repeats` R above 1 (repeated augmentation, arXiv:1901.09335 and 1902.05509) each of the first size / R samples
    of the permutation comes R times in a row. The epoch has as many positions as without.
    """
    order = np.random.RandomState(derive_seed(ORDER, seed, epoch)).permutation(size).astype(np.int64)
    return order if repeats == 1 else np.repeat(order[: -(-size // repeats)], repeats)[:size]


def train_requests(
    order: Indices, epoch: int, *, batch_size: int, rank: int, world_size: int, start: int = 0
) -> Iterator[BatchRequest]:
    """Yield this rank's batches from global position `start` on; what does not fill a global batch is dropped."""
    step = batch_size * world_size
    for first in range(start, len(order) - step + 1, step):
        position = first + rank * batch_size
        indices = tuple(order[position : position + batch_size].tolist())
        yield BatchRequest(epoch, position, indices, batch_size)


def eval_requests(size: int, *, batch_size: int, rank: int, world_size: int) -> Iterator[BatchRequest]:
    """Yield this rank's batches of a set in its own order: as many on every rank, the last padded with sample 0."""
    for first in range(0, size, batch_size * world_size):
        position = first + rank * batch_size
        indices = tuple(range(min(position, size), min(position + batch_size, size)))
        padding = (0,) * (batch_size - len(indices))
        yield BatchRequest(0, position, indices + padding, len(indices))


def balanced_subset(targets: Sequence[int], count: int, seed: int) -> Indices:
    """`count` samples with as equal a number a class as the set has, picked by `seed`; sorted.

    Classes take turns in a random order, each giving its next sample in a random order, until there are
    enough.
    """
    random = np.random.RandomState(derive_seed(seed))
    labels = np.asarray(targets)
    shuffled = random.permutation(len(labels))
    classes = random.permutation(np.unique(labels))
    turn = np.empty(len(labels), dtype=np.int64)  # of each sample, within its class
    rank_of = {int(label): place for place, label in enumerate(classes)}
    seen: dict[int, int] = dict.fromkeys(rank_of, 0)
    for index in shuffled:
        label = int(labels[index])
        turn[index] = seen[label] * len(classes) + rank_of[label]
        seen[label] += 1
    return np.sort(np.argsort(turn)[:count]).astype(np.int64)


# The random generators of a process (torch, numpy, Python): seeded for each batch, or left as they were.


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
