"""Select and replace heads or tokens at places that Python knows, without an index tensor.

To make an index tensor on a GPU, its numbers are copied there, and the copy waits for all that the GPU has to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

Run = tuple[int, int]
"""First and last place, the last excluded."""


def runs_of(index: Sequence[int]) -> list[Run]:
    """Return the runs of consecutive places in `index`, in its order."""
    runs: list[Run] = []
    for place in index:
        if runs and runs[-1][1] == place:
            runs[-1] = runs[-1][0], place + 1
        else:
            runs.append((place, place + 1))
    return runs


def pick_dim(x: Tensor, dim: int, index: Sequence[int] | None) -> Tensor:
    """Return `x` at `index` along `dim`: a view where the index is one run, a copy otherwise."""
    if index is None:
        return x
    runs = runs_of(index)
    if len(runs) == 1:
        return x.narrow(dim, runs[0][0], len(index))
    cuts = sorted({0, x.shape[dim], *(place for run in runs for place in run)})
    sizes = [stop - start for start, stop in pairwise(cuts)]
    pieces = dict(zip(cuts, x.split(sizes, dim), strict=False))  # one split: its backward pass is one copy
    return torch.cat([pieces[cut] for start, stop in runs for cut in cuts if start <= cut < stop], dim)


def put_dim(part: Tensor, whole: Tensor, dim: int, index: Sequence[int]) -> Tensor:
    """Return a copy of `whole` with `part` at the different places `index` along `dim`."""
    runs = runs_of(index)
    given = dict(zip(runs, part.split([stop - start for start, stop in runs], dim), strict=True))
    cuts = sorted({0, whole.shape[dim], *(place for run in runs for place in run)})
    segments = list(pairwise(cuts))
    kept = whole.split([stop - start for start, stop in segments], dim)
    return torch.cat([given.get(each, own) for each, own in zip(segments, kept, strict=True)], dim)
