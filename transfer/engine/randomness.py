"""The random generators of a process (torch, numpy, Python) as tensors that a state file holds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor


def seed_everything(seed: int, rank: int) -> None:
    """Seeds all generators of this process, differently on each rank, lest masks repeat."""
    set_seed((seed + 1_000_003 * rank) % 2**32)


def capture() -> dict[str, Tensor]:
    """The state of every generator. Restoring it makes the same numbers come again."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, next_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy.rest": torch.tensor([float(position), float(has_gauss), float(gauss)], dtype=torch.float64),
        "python.keys": torch.tensor(internal, dtype=torch.int64),
        "python.rest": torch.tensor(
            [float(version), float(next_gauss is not None), next_gauss or 0.0], dtype=torch.float64
        ),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: Mapping[str, Tensor]) -> None:
    """Puts `capture()` back. A CUDA state is skipped on a machine without CUDA."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss = states["numpy.rest"].tolist()
    np.random.set_state(
        ("MT19937", states["numpy.keys"].numpy().astype(np.uint32), int(position), int(has_gauss), gauss)
    )
    version, has_next, next_gauss = states["python.rest"].tolist()
    random.setstate((int(version), tuple(states["python.keys"].tolist()), next_gauss if has_next else None))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def preserved() -> Iterator[None]:
    """Leaves the generators as they were, whatever the block draws.

    A data loader draws when its iterator is made, which after a restart happens in the middle of an epoch:
    what the student draws (stochastic depth, masks) must not depend on it.
    """
    held = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(held[0])
        np.random.set_state(held[1])
        torch.set_rng_state(held[2])
