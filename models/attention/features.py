"""Feature maps φ of kernel attention, φ(q)·φ(k) in place of exp(s q·k), without parameters.

Shape suffixes: B batch, H heads, N tokens, D head width, F features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .base import Geometry, Heads, LayerShape
from .chunked import LOG2_E, Chunk, ChunkedFeatures
from .kernels import precise

MOST_POLA = 4
"""The largest power of `Pola` is one more."""
NALA = 3
"""The power of a query of `Nala` lies between a half of it and one and a half."""


class FeatureMap(nn.Module, ABC):
    """φ for queries and keys. Only maps with `sizes_features` take the option `num_features`."""

    nonnegative = True
    positive = True
    """No query has φ(q) = 0, which would make its row of the map zero."""
    needs_grid = False
    sizes_features = False
    opposed = False
    """φ(x) is [x₊, x₋], and the second half of the values has the map of opposite signs, by [q₋, q₊]."""
    candidates: tuple[float, ...] = ()
    """The arguments of `adjust` that calibration tries for each head. One of them changes nothing."""

    def __init__(self, shape: LayerShape, num_features: int | None = None) -> None:
        super().__init__()
        if num_features is not None and not self.sizes_features:
            raise ConfigError(
                f"plan: num_features={num_features}: this feature map has one feature per channel; remove the option"
            )
        if num_features is not None and (not isinstance(num_features, int) or num_features < 1):
            raise ConfigError(f"plan: num_features={num_features} is not a positive whole number")
        self.shape = shape

    def num_features(self, geometry: Geometry) -> int:
        """Return F, the width of φ(q)."""
        return self.shape.head_dim

    @property
    def macs_per_token(self) -> int:
        """Return the multiply-adds of φ for one token and one head."""
        return 0

    @abstractmethod
    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Return φ(q) and φ(k), each (B, H, N, F), from projections in float32 or float64."""

    def chunked(self, heads: Heads) -> ChunkedFeatures | None:
        """Return φ of a chunk of tokens with its derivative; None if the map has none."""
        return None

    def adjust(self, value_H11: Tensor) -> None:
        """Change each head's temperature, or its nearest equivalent, by one of the `candidates`."""


class Elu(FeatureMap):
    """φ(x) = elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)."""

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = heads.qk()
        return F.elu(q) + 1, F.elu(k) + 1

    def chunked(self, heads: Heads) -> ChunkedFeatures:
        return EluChunks(self.shape.head_dim)


class Relu(FeatureMap):
    """φ(x) = relu(x)."""

    positive = False

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = heads.qk()
        return F.relu(q), F.relu(k)

    def chunked(self, heads: Heads) -> ChunkedFeatures:
        return ReluChunks(self.shape.head_dim)


class Identity(FeatureMap):
    """φ(x) = x, for a normalizer that does not need positive features."""

    nonnegative = False
    positive = False

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = heads.qk()
        return q, k


class Signed(FeatureMap):
    """Features [x₊, x₋]: each channel of a power of |x| where x is positive, and where it is negative."""

    def num_features(self, geometry: Geometry) -> int:
        return 2 * self.shape.head_dim

    @property
    def macs_per_token(self) -> int:
        return 4 * self.shape.head_dim


class Pola(Signed):
    """φ(x) = [x₊, x₋] with x± = relu(±x / softplus(t))ᵖ and p = 1 + 4 σ(w) (Meng et al. 2025, arXiv 2501.15061).

    PolaFormer: q₊·k₊ + q₋·k₋, of equal signs, weighs the first half of each head's channels, q₋·k₊ + q₊·k₋, of
    opposite signs, the second, so that a head has two maps. t and w, one a channel, start at zero. The paper adds a
    position embedding to the keys, which belongs to one grid, and multiplies the output by a projection of the layer's
    input, which operators do not get.
    """

    opposed = True

    def __init__(self, shape: LayerShape, num_features: int | None = None) -> None:
        super().__init__(shape, num_features)
        size = (shape.num_heads, 1, shape.head_dim)
        self.temperature, self.power = (nn.Parameter(torch.zeros(size)) for _ in range(2))

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = heads.qk()
        scale = F.softplus(self.temperature.to(q.dtype))
        power = 1 + MOST_POLA * self.power.to(q.dtype).sigmoid()
        return _by_sign((q.abs() / scale) ** power, q), _by_sign((k.abs() / scale) ** power, k)


class Nala(Signed):
    """φ(q) = [d₊ᵖ, d₋ᵖ] with d = q / ‖q‖ and p = 3 (1/2 + tanh ‖q‖), φ(k) = [k₊³, k₋³], x± = relu(±x).

    NaLaFormer (Meng et al. 2025, arXiv 2506.21137) in the form of its released code: a longer query attends more
    sharply, which the division by the row's sum would otherwise take away. The code also multiplies the output by a
    projection of the layer's input, which operators do not get.
    """

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = heads.qk()
        norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        power = NALA * (0.5 + norm.tanh())
        directions = q.abs() / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        return _by_sign(directions**power, q), _by_sign((k * k * k).abs(), k)


def _by_sign(x_BHND: Tensor, signed_BHND: Tensor) -> Tensor:
    """Return [x₊, x₋] (B, H, N, 2 D): x where `signed_BHND` is positive, and where it is negative."""
    return torch.cat([x_BHND * (signed_BHND > 0), x_BHND * (signed_BHND < 0)], -1)


class Cosine(FeatureMap):
    """φ(x) = relu(x), with a pair of grid tokens weighted by cos(π/2 Δrow/height) cos(π/2 Δcolumn/width).

    cosFormer (Qin et al. 2022, arXiv 2202.08791) has one cosine along a sequence; a grid has one for each axis.
    Because cos(a − b) = cos a cos b + sin a sin b, this is a product of 4 D features. A pair with a prefix token,
    which has no position, has weight 1. This takes 2 D more features: grid queries have the second, grid keys the
    first, prefix queries the first and prefix keys both.
    """

    positive = False
    needs_grid = True

    def num_features(self, geometry: Geometry) -> int:
        return (6 if geometry.num_prefix else 4) * self.shape.head_dim

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = heads.qk()
        q_places, k_places = _all_places(heads.tokens(), q)
        return _products(F.relu(q), q_places), _products(F.relu(k), k_places)

    def chunked(self, heads: Heads) -> ChunkedFeatures:
        q, _ = heads.qk()
        q_places, k_places = _all_places(heads.tokens(), precise(q[:, :, :0]))
        return CosineChunks(self.num_features(heads.tokens()), q_places, k_places)


ROPE_BASE = 10_000.0


def rotated(x_BHNF: Tensor, width: int, geometry: Geometry) -> Tensor:
    """Rotate pairs of neighboring features by angles of the token's place, in each `width` features alike.

    The first half of the pairs turns by the row times 10000^(-t), the second by the column times it, with t from 0 to 1
    over the pairs of a half: RoFormer's embedding (Su et al. 2021, arXiv 2104.09864) on two axes, with the angles of
    RALA's code. Prefix tokens are not turned.
    """
    angles_nP = _angles(width, geometry, x_BHNF)
    if geometry.num_prefix:
        angles_nP = F.pad(angles_nP, (0, 0, geometry.num_prefix, 0))
    cos, sin = angles_nP.cos()[:, None], angles_nP.sin()[:, None]
    first, second = x_BHNF.unflatten(3, (-1, width // 2, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(3)


def _angles(width: int, geometry: Geometry, like: Tensor) -> Tensor:
    """Return the angle of each patch in each pair of features, (n, width / 2)."""
    steps = torch.linspace(0, 1, width // 4, device=like.device, dtype=like.dtype)
    rows, columns = (
        torch.arange(size, device=like.device, dtype=like.dtype)[:, None] * ROPE_BASE**-steps
        for size in geometry.grid
    )
    (height, half), breadth = rows.shape, len(columns)
    parts = rows[:, None].expand(height, breadth, half), columns[None].expand(height, breadth, half)
    return torch.cat(parts, -1).flatten(0, 1)


def _all_places(geometry: Geometry, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of each token in its features: of queries and of keys, each (N, 4 or 6)."""
    places_nC = _places(geometry, like)
    if not geometry.num_prefix:
        return places_nC, places_nC
    return (
        _with_prefix(places_nC, grid=(0.0, 1.0), prefix=(1.0, 0.0), geometry=geometry),
        _with_prefix(places_nC, grid=(1.0, 0.0), prefix=(1.0, 1.0), geometry=geometry),
    )


def _places(geometry: Geometry, like: Tensor) -> Tensor:
    """Return (n, 4): products of cosine and sine of each patch's row and column, as angles up to π/2."""
    angles = [
        torch.arange(size, device=like.device, dtype=like.dtype) * (math.pi / 2 / size)
        for size in geometry.grid
    ]
    rows, columns = (torch.stack([angle.cos(), angle.sin()], 1) for angle in angles)
    return (rows[:, None, :, None] * columns[None, :, None, :]).reshape(-1, 4)


def _with_prefix(
    places_nC: Tensor, grid: tuple[float, float], prefix: tuple[float, float], geometry: Geometry
) -> Tensor:
    """Return (N, 6): two more columns, `grid` at patches and `prefix` at prefix tokens."""
    first_PC = places_nC.new_zeros(geometry.num_prefix, places_nC.shape[1])
    parts = [(first_PC, prefix), (places_nC, grid)]
    return torch.cat([_with_columns(each, columns) for each, columns in parts])


def _with_columns(x_NC: Tensor, columns: tuple[float, float]) -> Tensor:
    """Append columns of one number each, which are not copied to a GPU as those of `torch.tensor` are."""
    return torch.cat([x_NC, *(x_NC.new_full((len(x_NC), 1), value) for value in columns)], 1)


def _products(x_BHND: Tensor, places_NC: Tensor) -> Tensor:
    """Return the features (B, H, N, C·D)."""
    return (places_NC[:, :, None] * x_BHND[:, :, :, None, :]).flatten(3)


class EluChunks(ChunkedFeatures):
    """The features of `Elu`: elu(x) + 1 = exp(min(x, 0)) + max(x, 0), whose derivative is min(φ, 1)."""

    by_features = True

    def queries(self, x_BHnD: Tensor, chunk: Chunk, out: Tensor) -> Tensor:
        high = torch.clamp_min(x_BHnD, 0, out=self.scratch("second", x_BHnD))
        return torch.clamp_max(x_BHnD, 0, out=out).mul_(LOG2_E).exp2_().add_(high)

    def queries_gradient(
        self, x_BHnD: Tensor, features_BHnF: Tensor, grad_BHnF: Tensor, chunk: Chunk, out: Tensor
    ) -> None:
        torch.clamp_max(features_BHnF, 1, out=out).mul_(grad_BHnF)

    keys, keys_gradient = queries, queries_gradient


class ReluChunks(ChunkedFeatures):
    """The features of `Relu`."""

    by_features = True

    def queries(self, x_BHnD: Tensor, chunk: Chunk, out: Tensor) -> Tensor:
        return torch.clamp_min(x_BHnD, 0, out=out)

    def queries_gradient(
        self, x_BHnD: Tensor, features_BHnF: Tensor, grad_BHnF: Tensor, chunk: Chunk, out: Tensor
    ) -> None:
        torch.mul(grad_BHnF, features_BHnF > 0, out=out)

    keys, keys_gradient = queries, queries_gradient


class CosineChunks(ChunkedFeatures):
    """The features of `Cosine`."""

    def __init__(self, num_features: int, q_places_NC: Tensor, k_places_NC: Tensor) -> None:
        super().__init__(num_features)
        self.q_places, self.k_places = q_places_NC, k_places_NC

    def queries(self, x_BHnD: Tensor, chunk: Chunk, out: Tensor) -> Tensor:
        return self._products(x_BHnD, self.q_places[chunk.tokens], out)

    def keys(self, x_BHnD: Tensor, chunk: Chunk, out: Tensor) -> Tensor:
        return self._products(x_BHnD, self.k_places[chunk.tokens], out)

    def queries_gradient(
        self, x_BHnD: Tensor, features_BHnF: Tensor, grad_BHnF: Tensor, chunk: Chunk, out: Tensor
    ) -> None:
        _products_gradient(x_BHnD, grad_BHnF, self.q_places[chunk.tokens], out)

    def keys_gradient(
        self, x_BHnD: Tensor, features_BHnF: Tensor, grad_BHnF: Tensor, chunk: Chunk, out: Tensor
    ) -> None:
        _products_gradient(x_BHnD, grad_BHnF, self.k_places[chunk.tokens], out)

    def _products(self, x_BHnD: Tensor, places_nC: Tensor, out: Tensor) -> Tensor:
        high = torch.clamp_min(x_BHnD, 0, out=self.scratch("second", x_BHnD))
        places = places_nC[:, :, None]
        torch.mul(places, high[:, :, :, None, :], out=out.unflatten(3, (-1, x_BHnD.shape[3])))
        return out


def _products_gradient(x_BHnD: Tensor, grad_BHnF: Tensor, places_nC: Tensor, out: Tensor) -> None:
    parts = grad_BHnF.unflatten(3, (-1, x_BHnD.shape[3]))
    torch.sum(parts.mul_(places_nC[:, :, None]), 3, out=out)
    out *= x_BHnD > 0


# FAVOR+: positive orthogonal random features of the softmax kernel (Performer).

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
        return x @ self.omega.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2


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
    return torch.cat(blocks)[:count] * lengths


def _orthogonal(width: int) -> Tensor:
    """Draw a uniform orthogonal matrix. LAPACK's Q alone is not uniform: its signs bias the estimate."""
    q, r = torch.linalg.qr(torch.randn(width, width, device="cpu"))
    return (q * r.diagonal().sign()).T
