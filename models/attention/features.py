"""Feature maps φ of kernel attention: what stands in for exp(s q·k) as φ(q)·φ(k).

Shape suffixes: B batch, H heads, N tokens, D head width, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from .base import LayerShape


class FeatureMap(nn.Module, ABC):
    """φ for queries and keys."""

    nonnegative = True
    positive = True
    """No query has φ(q) = 0, whose row of the map would be zero."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.shape = shape

    @property
    def num_features(self) -> int:
        """F, the width of φ(q)."""
        return self.shape.head_dim

    @property
    def macs_per_token(self) -> int:
        """Multiply-adds of φ for one token and one head."""
        return 0

    @abstractmethod
    def forward(self, q_BHND: Tensor, k_BHND: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """φ(q) and φ(k), each (B, H, N, F)."""

    def refresh(self) -> None:
        """Draw anew what is random."""


class Elu(FeatureMap):
    """φ(x) = elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)."""

    def forward(self, q_BHND: Tensor, k_BHND: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return F.elu(q_BHND) + 1, F.elu(k_BHND) + 1


class Relu(FeatureMap):
    """φ(x) = relu(x)."""

    positive = False

    def forward(self, q_BHND: Tensor, k_BHND: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return F.relu(q_BHND), F.relu(k_BHND)


FEATURES: dict[str, type[FeatureMap]] = {"elu": Elu, "relu": Relu}
