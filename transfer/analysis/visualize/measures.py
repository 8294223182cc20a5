"""What attention maps and tokens come to in numbers: shares, rollout, entropy, distance, CKA.

A map with negative weights, or rows that do not sum to one, is read as *shares* first: |A| with rows divided by
their sums. Of softmax attention these are the map itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....models.attention.base import Geometry


def shares(maps: Tensor) -> Tensor:
    """Return |A| with each row (the last dimension) divided by its sum; a row of zeros is spread evenly."""
    weights = maps.abs()
    total = weights.sum(-1, keepdim=True)
    even = torch.full_like(weights, 1 / maps.shape[-1])
    return torch.where(total > 0, weights / total.clamp_min(torch.finfo(maps.dtype).tiny), even)


def rollout(maps_LHNN: Tensor) -> Tensor:
    """Return the rollout after each layer, (L, N, N): R_l = (A_l + I)/2 · R_{l-1}, R_0 = I, A_l the mean of the
    heads' shares (Abnar and Zuidema, arXiv:2005.00928, equation 1). Rows sum to one."""
    layers_LNN = shares(maps_LHNN).mean(1)
    eye = torch.eye(layers_LNN.shape[-1], dtype=layers_LNN.dtype, device=layers_LNN.device)
    rolled, so_far = [], eye
    for layer_NN in layers_LNN:
        so_far = (layer_NN + eye) / 2 @ so_far
        rolled.append(so_far)
    return torch.stack(rolled)


def entropy(maps: Tensor) -> Tensor:
    """Return the mean over queries of the entropy of a row's shares, in nats: (..., N, N) to (...)."""
    rows = shares(maps)
    return -torch.xlogy(rows, rows).sum(-1).mean(-1)


def mean_distance(maps: Tensor, geometry: Geometry) -> Tensor:
    """Return how far a patch looks: (..., N, N) to (...), in patches.

    The mean over patch queries of Σ_j a_ij |i - j|, with |i - j| the Euclidean distance of two patches of the
    grid and a the row's shares among patches; prefix tokens have no place and are left out.
    """
    start = geometry.num_prefix
    rows = shares(maps[..., start:, start:])
    return (rows * patch_distances(geometry).to(rows)).sum(-1).mean(-1)


def patch_distances(geometry: Geometry) -> Tensor:
    """Return the Euclidean distances between the patches of a grid, (P, P), in patches."""
    height, width = geometry.grid
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    return torch.cdist(places, places)


def linear_cka(x_SC: Tensor, y_SD: Tensor) -> float:
    """Return the linear CKA of two models' features of the same S samples, between 0 and 1.

    ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) in Frobenius norms, features centred over samples (Kornblith et al.,
    arXiv:1905.00414, section 3). 0 where either is constant. In float64.
    """
    x, y = (features.double() - features.double().mean(0) for features in (x_SC, y_SD))
    norms = (x.T @ x).norm() * (y.T @ y).norm()
    return ((y.T @ x).square().sum() / norms).item() if norms > 0 else 0.0
