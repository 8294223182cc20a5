"""Which samples make which batch: a pure function of (seed, epoch, position), two integers to resume from.

A position is *global*: the place of a sample in the epoch's order over all ranks. A run that resumes on
another number of ranks continues the order where it stopped, and repeats or drops no sample.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

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


class Order(Protocol):
    """Which sample is at each position of an epoch."""

    def __len__(self) -> int: ...
    def __getitem__(self, places: slice, /) -> Indices: ...


class Permutation:
    """A bijection of 0 .. size - 1 that is computed, not stored: a Feistel network over the least 4^h >= size.

    With the halves (a, b) of h bits, each round is (a, b) -> (b, a xor f(b, key)) for a mixing function f. A value
    that falls outside is permuted again until it is inside, which ends because the network is a bijection (cycle
    walking, Black and Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9). `parts` seed the keys.
    """

    ROUNDS = 6

    def __init__(self, size: int, *parts: int) -> None:
        self._size = size
        self._half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.random.SeedSequence(parts).generate_state(self.ROUNDS, np.uint64)

    def __call__(self, places: Indices) -> Indices:
        """Return where each of `places`, from 0 to size - 1, goes."""
        values = self._network(places.astype(np.uint64))
        while (outside := values >= self._size).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_scattered(right ^ key) & self._mask)
        return (left << self._half) | right


def _scattered(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return 64-bit numbers of which each bit depends on all bits of the given ones.

    The factors are the first 64 bits of 1 / golden ratio and of the square root of two after its point.
    """
    for factor in (0x9E3779B97F4A7C15, 0x6A09E667F3BCC909):
        values = (values ^ (values >> np.uint64(32))) * np.uint64(factor)
    return values ^ (values >> np.uint64(32))


WINDOW = 16
"""Shards whose samples are mixed: as many are read at a time."""


class WindowOrder:
    """The order of an epoch over shards of `counts` samples, computed for the positions that are asked for.

    Shards are permuted, and so are the samples of each `WINDOW` shards that follow each other. A sample's number
    counts from the first shard's first sample. With `repeats` R, position p shows what is at p // R without.
    """

    def __init__(self, counts: Indices, seed: int, epoch: int, repeats: int = 1) -> None:
        self._parts, self._repeats = (ORDER, seed, epoch), repeats
        shards = Permutation(len(counts), *self._parts)(np.arange(len(counts)))
        self._sizes = counts[shards]
        self._ends = np.cumsum(self._sizes)
        self._firsts = (np.cumsum(counts) - counts)[shards]
        self._windows = np.append(self._ends[WINDOW - 1 : -1 : WINDOW], self._ends[-1])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, places: slice) -> Indices:
        wanted = np.arange(*places.indices(len(self)), dtype=np.int64) // self._repeats
        windows = np.searchsorted(self._windows, wanted, "right")
        for window in np.unique(windows):
            begin = self._windows[window - 1] if window else 0
            size = int(self._windows[window] - begin)
            inside = windows == window
            wanted[inside] = begin + Permutation(size, *self._parts, 1 + int(window))(wanted[inside] - begin)
        shards = np.searchsorted(self._ends, wanted, "right")
        return self._firsts[shards] + wanted - (self._ends - self._sizes)[shards]


def train_requests(
    order: Order, epoch: int, *, batch_size: int, rank: int, world_size: int, start: int = 0
) -> Iterator[BatchRequest]:
    """Yield this rank's batches from global position `start` on; what does not fill a global batch is dropped."""
    step = batch_size * world_size
    for first in range(start, len(order) - step + 1, step):
        position = first + rank * batch_size
        indices = tuple(order[position : position + batch_size].tolist())
        yield BatchRequest(epoch, position, indices, batch_size)


def eval_requests(
    chosen: Sequence[int], *, batch_size: int, rank: int, world_size: int
) -> Iterator[BatchRequest]:
    """Yield this rank's batches of samples in their order: as many on every rank, the last padded with the first."""
    for first in range(0, len(chosen), batch_size * world_size):
        position = first + rank * batch_size
        indices = tuple(chosen[position : position + batch_size])
        padding = (chosen[0],) * (batch_size - len(indices))
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
