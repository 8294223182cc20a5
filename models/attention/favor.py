"""FAVOR+: positive orthogonal random features of the softmax kernel (Performer)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Geometry, Heads, LayerShape
from .feature_chunks import LOG2_E, Chunk, ChunkedFeatures
from .features import FeatureMap
from .kernels import precise

EPSILON = 1e-4


class Favor(FeatureMap):
    """φ(x) = exp(Ω x' − ‖x'‖²/2 − c) + 1e-4 with x' = √s τ x (Choromanski et al. 2021, arXiv 2009.14794).

    Without the constants, φ(q)·φ(k) / F is an unbiased estimate of exp(s q·k). The rows of Ω are orthogonal in blocks
    of D, each as long as a Gaussian vector. c is the largest exponent of a query, or of all keys of one head and
    image: it keeps the exponential at most 1 and cancels in the map. The published code subtracts the largest Ω x'
    instead, so that the added 1e-4 dominates tokens of large norm.

    Ω is drawn once and saved as a buffer, equal on all ranks; the paper's training redraws it. τ (one per head) is 1
    unless calibration lowers it, because the variance grows as exp(‖q' + k'‖²).
    """

    sizes_features = True
    candidates = (1.0, 0.35, 0.5, 0.6, 0.7, 0.85)
    omega: Tensor
    temperature: Tensor

    def __init__(self, shape: LayerShape, num_features: int | None = None) -> None:
        super().__init__(shape, num_features)
        self.width = num_features or default_features(shape)
        self.register_buffer("omega", orthogonal_features(self.width, shape.head_dim))
        self.register_buffer("temperature", torch.ones(shape.num_heads, 1, 1))

    def num_features(self, geometry: Geometry) -> int:
        return self.width

    @property
    def macs_per_token(self) -> int:
        return (self.width + 1) * self.shape.head_dim

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = heads.qk()
        q_BHNF, k_BHNF = (self._exponents(x, heads.scale) for x in (q, k))
        q_largest = q_BHNF.detach().amax(3, keepdim=True)
        k_largest = k_BHNF.detach().amax((2, 3), keepdim=True)
        return (q_BHNF - q_largest).exp() + EPSILON, (k_BHNF - k_largest).exp() + EPSILON

    def chunked(self, heads: Heads) -> ChunkedFeatures:
        return FavorChunks(self.omega, self.temperature, heads)

    def adjust(self, value_H11: Tensor) -> None:
        self.temperature.mul_(value_H11)

    def _exponents(self, x_BHND: Tensor, scale: float) -> Tensor:
        x = x_BHND * (scale**0.5 * self.temperature.to(x_BHND.dtype))
        exponents: Tensor = x @ self.omega.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2
        return exponents


class FavorChunks(ChunkedFeatures):
    """The features of `Favor`. c of the keys is the largest exponent so far: it grows from chunk to chunk.

    The norm of a query is in each of its exponents and in the largest, so it cancels; its derivative does not.
    Exponents are those of 2: Ω x' and ‖x'‖²/2 times log₂ e.
    """

    rescaled = True

    def __init__(self, omega_FD: Tensor, temperature_H11: Tensor, heads: Heads) -> None:
        super().__init__(len(omega_FD), floor=EPSILON)
        q, _ = heads.qk()
        factor_H11 = heads.scale**0.5 * temperature_H11.to(precise(q).dtype)
        self.omega_HFD = factor_H11 * omega_FD.to(factor_H11.dtype)
        self.exponent_HDF = (LOG2_E * self.omega_HFD).mT
        self.square_H11 = factor_H11.square()
        self.largest = q.new_full((*q.shape[:2], 1, 1), -torch.inf, dtype=factor_H11.dtype)

    def queries(self, x_BHnD: Tensor, chunk: Chunk, out: Tensor) -> Tensor:
        exponents = torch.matmul(x_BHnD, self.exponent_HDF, out=out)
        return exponents.sub_(exponents.amax(3, keepdim=True)).exp2_()

    def keys(self, x_BHnD: Tensor, chunk: Chunk, out: Tensor) -> Tensor:
        exponents, norms = self._exponents(x_BHnD, out)
        return exponents.sub_(norms + self.largest[chunk.images]).exp2_()

    def first_keys(self, x_BHnD: Tensor, chunk: Chunk, out: Tensor) -> tuple[Tensor, Tensor | None]:
        exponents, norms = self._exponents(x_BHnD, out)
        before = self.largest[chunk.images]
        largest = torch.maximum(before, (exponents.amax(3, keepdim=True) - norms).amax(2, keepdim=True))
        factor = (before - largest).exp2_()
        self.largest[chunk.images] = largest
        return exponents.sub_(norms + largest).exp2_(), factor

    def queries_gradient(
        self, x_BHnD: Tensor, features_BHnF: Tensor, grad_BHnF: Tensor, chunk: Chunk, out: Tensor
    ) -> None:
        grad = grad_BHnF.mul_(features_BHnF)
        norms = self.square_H11 * grad.sum(3, keepdim=True)
        torch.matmul(grad, self.omega_HFD, out=out).addcmul_(norms, x_BHnD, value=-1)

    keys_gradient = queries_gradient

    def _exponents(self, x_BHnD: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Return Ω x' (B, H, n, F), in `out`, and ‖x'‖²/2 (B, H, n, 1), times log₂ e."""
        norms = torch.mul(x_BHnD, x_BHnD, out=self.scratch("second", x_BHnD)).sum(3, keepdim=True)
        return torch.matmul(x_BHnD, self.exponent_HDF, out=out), norms.mul_(self.square_H11 * (LOG2_E / 2))


def default_features(shape: LayerShape) -> int:
    """Return the paper's D ln D, but at most a quarter of the tokens, and at least D.

    With more features than half the tokens, the operator would cost more than softmax attention.
    """
    published = int(shape.head_dim * math.log(shape.head_dim))
    return max(shape.head_dim, min(published, shape.geometry.num_tokens // 4))


def orthogonal_features(count: int, width: int) -> Tensor:
    """Draw Gaussian rows (count, width) on the CPU in float32, orthogonal within each block of `width`."""
    blocks = [_orthogonal(width) for _ in range(-(-count // width))]
    lengths = torch.randn(count, width, device="cpu").norm(dim=1, keepdim=True)
    rows: Tensor = torch.cat(blocks)[:count] * lengths
    return rows


def _orthogonal(width: int) -> Tensor:
    """Draw a uniform orthogonal matrix. LAPACK's Q alone is not uniform: its signs bias the estimate."""
    q, r = torch.linalg.qr(torch.randn(width, width, device="cpu"))
    rows: Tensor = (q * r.diagonal().sign()).T
    return rows
