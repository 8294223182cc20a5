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
from .feature_chunks import LOG2_E, Chunk, ChunkedFeatures
from .kernels import precise


class FeatureMap(nn.Module, ABC):
    """φ for queries and keys. Only maps with `sizes_features` take the option `num_features`."""

    nonnegative = True
    positive = True
    """No query has φ(q) = 0, which would make its row of the map zero."""
    needs_grid = False
    sizes_features = False
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
