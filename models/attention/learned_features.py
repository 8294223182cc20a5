"""Feature maps with parameters: T2R, both forms of Hedgehog, and the focused map of FLatten."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Geometry, Heads, LayerShape
from .features import FeatureMap

FOCUS = 3
FOCUSED_FLOOR = 1e-6


class LinearMaps(FeatureMap):
    """W x + b for queries and for keys, separate for each head. b starts at zero, W at the identity.

    If the number of features is not the head width, W starts as a random orthogonal matrix.
    """

    sizes_features = True
    has_bias = True

    def __init__(self, shape: LayerShape, num_features: int | None = None) -> None:
        super().__init__(shape, num_features)
        self.width = num_features or shape.head_dim
        self.q_weight, self.k_weight = (nn.Parameter(_start(shape, self.width)) for _ in range(2))
        if self.has_bias:
            size = (shape.num_heads, 1, self.width)
            self.q_bias, self.k_bias = (nn.Parameter(torch.zeros(size)) for _ in range(2))

    def num_features(self, geometry: Geometry) -> int:
        return self.width

    @property
    def macs_per_token(self) -> int:
        return self.shape.head_dim * self.width

    def mapped(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Return W x + b of queries and keys, (B, H, N, width)."""
        q, k = heads.qk()
        q, k = q @ self.q_weight.to(q.dtype), k @ self.k_weight.to(k.dtype)
        return (q + self.q_bias.to(q.dtype), k + self.k_bias.to(k.dtype)) if self.has_bias else (q, k)


class T2R(LinearMaps):
    """φ(x) = relu(W x + b) (Kasai et al. 2021, arXiv 2103.13076).

    Scaling W does not change the map, so calibration shifts b: up for flatter rows, down for sharper ones.
    """

    positive = False
    candidates = (0.0, -0.5, 0.25, 0.5, 1.0, 2.0, 4.0)

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = self.mapped(heads)
        return F.relu(q), F.relu(k)

    def adjust(self, value_H11: Tensor) -> None:
        for bias in (self.q_bias, self.k_bias):
            bias.data += value_H11


class Hedgehog(LinearMaps):
    """φ(x) = [softmax(W x), softmax(−W x)], as in LoLCATs (Zhang et al. 2024, arXiv 2410.10254).

    2 D features. The scale s of the layer is not applied: W contains the temperature, which calibration chooses.
    """

    has_bias = False
    candidates = (1.0, 0.25, 0.5, 0.7, 1.4, 2.0, 4.0)

    def num_features(self, geometry: Geometry) -> int:
        return 2 * self.width

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in self.mapped(heads))
        return q, k

    def adjust(self, value_H11: Tensor) -> None:
        for parameter in self.parameters():
            parameter.data *= value_H11


class JointHedgehog(Hedgehog):
    """φ(x) = softmax([2 (W x + b), −2 (W x + b)]): one softmax over both signs (Zhang et al. 2024, arXiv 2402.04347,
    in the form of the `fla` library). There all heads share W and b; here each head has its own.
    """

    has_bias = True

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = (torch.cat([2 * x, -2 * x], -1).softmax(-1) for x in self.mapped(heads))
        return q, k


class Focused(FeatureMap):
    """φ(x) = (‖y‖ / ‖y³‖) y³ with y = (relu(x) + 1e-6) / softplus(t) (Han et al. 2023, arXiv 2308.00442).

    The power is elementwise, and both norms are over all channels of all heads, as in the released code. Queries and
    keys share t, one per channel, which starts at zero.
    """

    positive = False

    def __init__(self, shape: LayerShape, num_features: int | None = None) -> None:
        super().__init__(shape, num_features)
        self.temperature = nn.Parameter(torch.zeros(shape.num_heads, 1, shape.head_dim))

    @property
    def macs_per_token(self) -> int:
        return 5 * self.shape.head_dim

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k = heads.qk()
        return self._focus(q), self._focus(k)

    def _focus(self, x_BHND: Tensor) -> Tensor:
        y = (F.relu(x_BHND) + FOCUSED_FLOOR) / F.softplus(self.temperature.to(x_BHND.dtype))
        power: Tensor = y**FOCUS
        return power * (_norm(y) / _norm(power))


def _norm(x_BHND: Tensor) -> Tensor:
    """Return the norm (B, 1, N, 1) of each token over the channels of all heads."""
    norm: Tensor = torch.linalg.vector_norm(x_BHND, dim=(1, 3), keepdim=True)
    return norm


def _start(shape: LayerShape, width: int) -> Tensor:
    """Return the initial W, (H, D, width)."""
    weight = torch.eye(shape.head_dim, width).repeat(shape.num_heads, 1, 1)
    if width != shape.head_dim:
        for matrix in weight:
            nn.init.orthogonal_(matrix)
    return weight
