"""What attention maps and tokens come to in numbers: shares, rollout, entropy, distance, CKA.

A map with negative weights, or rows that do not sum to one, is read as *shares* first: |A| with rows divided by
their sums. Of softmax attention these are the map itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...metrics.distance import LEAST_ROWS, DistanceSums


def shares(maps: Tensor) -> Tensor:
    """Return |A| with each row (the last dimension) divided by its sum; a row of zeros is spread evenly."""
    weights = maps.abs()
    total = weights.sum(-1, keepdim=True)
    even = torch.full_like(weights, 1 / maps.shape[-1])
    return torch.where(total > 0, weights / total.clamp_min(torch.finfo(maps.dtype).tiny), even)


def roll(before_NN: Tensor, layer_NN: Tensor) -> Tensor:
    """Return the rollout after a layer: R_l = (A_l + I)/2 · R_{l-1}, R_0 = I, A_l the mean of the heads' shares
    (Abnar and Zuidema, arXiv:2005.00928, equation 1). Rows that sum to one keep doing so."""
    return (layer_NN @ before_NN + before_NN) / 2


def entropy(maps: Tensor) -> Tensor:
    """Return the mean over queries of the entropy of a row's shares, in nats: (..., N, N) to (...)."""
    rows = shares(maps)
    return -torch.xlogy(rows, rows).sum(-1).mean(-1)


def mean_distance(maps: Tensor, distances: Tensor) -> Tensor:
    """Return how far a patch looks: (..., P, M) to (...), in patches.

    The mean over patches of Σ_j a_ij d_ij, with d (P, M) the distances to the M keys and a the row's shares among
    them; prefix tokens have no place and are left out.
    """
    return (shares(maps) * distances.to(maps)).sum(-1).mean(-1)


def linear_cka(x_SC: Tensor, y_SD: Tensor) -> float | None:
    """Return the debiased linear CKA of two models' features of the same S samples, as `Distance.cka`; in float64."""
    if len(x_SC) < LEAST_ROWS:
        return None
    sums = DistanceSums()
    sums.update(x_SC.double(), y_SD.double(), torch.ones(len(x_SC), dtype=torch.bool))
    return sums.result().cka
