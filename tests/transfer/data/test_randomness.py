"""Generators: seeded for a batch, preserved."""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch
from graftvit.transfer.data.sampler import MIXING, ORDER, SAMPLE, STUDENT, preserved, seed_batch

CPU = torch.device("cpu")


def draws() -> list[float]:
    return [
        *torch.rand(3).tolist(), torch.randn(()).item(),
        *np.random.rand(3).tolist(), np.random.randn(),
        *[random.random() for _ in range(3)], random.gauss(0, 1),
    ]  # fmt: skip


def test_a_batch_draws_the_same_whatever_was_drawn_before() -> None:
    seed_batch(3, 1, 64, CPU)
    first = draws()  # leaves half of a gaussian pair pending in numpy and in Python
    seed_batch(3, 1, 64, CPU)
    assert draws() == first


def test_seeds_epochs_and_positions_draw_differently() -> None:
    seen = set()
    for seed, epoch, position in itertools.product((0, 1), (0, 1), (0, 16, 32)):
        seed_batch(seed, epoch, position, CPU)
        seen.add(tuple(draws()))
    assert len(seen) == 12


def test_each_purpose_has_seeds_of_its_own() -> None:
    assert len({ORDER, SAMPLE, MIXING, STUDENT}) == 4


def test_preserved_leaves_no_trace() -> None:
    seed_batch(5, 0, 0, CPU)
    first = draws()
    seed_batch(5, 0, 0, CPU)
    with preserved():
        draws()
    assert draws() == first
