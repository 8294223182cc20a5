"""Normalizers of kernel attention: features φ(q), φ(k) to factors L, R of a map A = L Rᵀ / N whose rows sum to one.

Each takes φ(q) and φ(k) of shape (B, H, N, F), the mean key feature (B, H, 1, F) and the scale s of the layer, and
returns L and R, (B, H, N, F) or one column wider. The means are over tokens that are not padding.

Each also returns A V without the factors. It takes `Sums` of the keys and changes outputs (B, H, N, D) in place of
features, which are wider or as wide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

EPSILON = 1e-6
Factors: TypeAlias = tuple[Tensor, Tensor]


class Sums(NamedTuple):
    """Means over the keys j that are not padding."""

    products: Tensor
    """Of φ(k_j) v_jᵀ, (B, H, F, D)."""
    keys: Tensor
    """Of φ(k_j), (B, H, 1, F)."""
    values: Tensor | None
    """Of v_j, (B, H, 1, D), if the normalizer has an extra column."""


@dataclass(frozen=True)
class Normalizer:
    """A normalization and the properties of its map."""

    factors: Callable[[Tensor, Tensor, Tensor, float], Factors]
    output: Callable[[Tensor, Sums, float], Tensor]
    """A V from φ(q), the sums of the keys and the scale."""
    nonnegative: bool
    """The map is nonnegative if the features are."""
    divides: bool
    """It divides by φ(q)·φ̄(k), which can be zero for features of both signs."""
    extra: int
    """The number of columns of L and R beyond the features."""


def by_sum(q_BHNF: Tensor, k_BHNF: Tensor, mean_BH1F: Tensor, scale: float) -> Factors:
    """A_ij = φ(q_i)·φ(k_j) / Σ_j φ(q_i)·φ(k_j) (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 5)."""
    return q_BHNF / _sums(q_BHNF, mean_BH1F).clamp_min(EPSILON), k_BHNF


def inline(q_BHNF: Tensor, k_BHNF: Tensor, mean_BH1F: Tensor, scale: float) -> Factors:
    """A_ij = (1 + s φ(q_i)·(φ(k_j) − φ̄)) / N, signed: InLine (Han et al. 2024, arXiv 2412.06590, eq. 5)."""
    return _with_ones(scale * q_BHNF), _with_ones(k_BHNF - mean_BH1F)


def mala(q_BHNF: Tensor, k_BHNF: Tensor, mean_BH1F: Tensor, scale: float) -> Factors:
    """A_ij = (s φ(q_i)·φ(k_j) (1 + 1/z_i) − z_i) / N with z_i = s φ(q_i)·φ̄: MALA (Fan et al. 2025, arXiv 2507.00698).

    This is the map of `by_sum` plus the map of `inline` without its 1/N.
    """
    left, right = by_sum(q_BHNF, k_BHNF, mean_BH1F, scale)
    shift = -scale * _sums(q_BHNF, mean_BH1F)
    return torch.cat([left + scale * q_BHNF, shift], -1), _with_ones(right)


def sum_output(q_BHNF: Tensor, sums: Sums, scale: float) -> Tensor:
    """Return A V for the map of `by_sum`."""
    return (q_BHNF @ sums.products) / _totals(q_BHNF, sums).clamp_min(EPSILON)


def inline_output(q_BHNF: Tensor, sums: Sums, scale: float) -> Tensor:
    """Return A V for the map of `inline`."""
    assert sums.values is not None
    centered = sums.products - sums.keys.transpose(2, 3) * sums.values
    return q_BHNF @ (scale * centered) + sums.values


def mala_output(q_BHNF: Tensor, sums: Sums, scale: float) -> Tensor:
    """Return A V for the map of `mala`."""
    assert sums.values is not None
    totals = _totals(q_BHNF, sums)
    factors = totals.clamp_min(EPSILON).reciprocal() + scale
    return torch.addcmul((q_BHNF @ sums.products) * factors, totals, sums.values, value=-scale)


NORMALIZERS = {
    "sum": Normalizer(by_sum, sum_output, nonnegative=True, divides=True, extra=0),
    "inline": Normalizer(inline, inline_output, nonnegative=False, divides=False, extra=1),
    "mala": Normalizer(mala, mala_output, nonnegative=False, divides=True, extra=1),
}


def _totals(q_BHNF: Tensor, sums: Sums) -> Tensor:
    """Return φ(q)·φ̄, (B, H, N, 1)."""
    return q_BHNF @ sums.keys.transpose(2, 3)


def _sums(q_BHNF: Tensor, mean_BH1F: Tensor) -> Tensor:
    return (q_BHNF * mean_BH1F).sum(-1, keepdim=True)


def _with_ones(x_BHNF: Tensor) -> Tensor:
    return torch.cat([x_BHNF, torch.ones_like(x_BHNF[..., :1])], -1)
