"""Weighted nearest neighbors: predict the classes of images from the features of a frozen model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBORS = 20
TEMPERATURE = 0.07
ROWS = 64
"""Images whose similarities to all training images are held at a time."""


class NearestNeighbors:
    """The classifier of instance discrimination (arXiv:1805.01978), with the values of DINO (arXiv:2104.14294).

    With f(x) the features divided by their length and N the k training images nearest to x by s_i = f(x)·f(x_i),
    class c gets Σ_{i in N, y_i = c} exp(s_i / T) votes; k = 20, T = 0.07. `features_ND` and `labels_N` are those of
    the training images. The result is (B, classes).
    """

    def __init__(
        self,
        features_ND: Tensor,
        labels_N: Tensor,
        num_classes: int,
        *,
        neighbors: int = NEIGHBORS,
        temperature: float = TEMPERATURE,
    ) -> None:
        self._features_ND = F.normalize(features_ND, dim=1)
        self._labels_N = labels_N
        self._num_classes = num_classes
        self._neighbors = min(neighbors, len(labels_N))
        self._temperature = temperature

    def __call__(self, features_BD: Tensor) -> Tensor:
        return torch.cat([self._votes(rows) for rows in F.normalize(features_BD, dim=1).split(ROWS)])

    def _votes(self, features_BD: Tensor) -> Tensor:
        similarity_BN = features_BD.to(self._features_ND.dtype) @ self._features_ND.T
        nearest_BK, index_BK = similarity_BN.topk(self._neighbors, dim=1)
        votes_BC = nearest_BK.new_zeros(len(nearest_BK), self._num_classes)
        return votes_BC.scatter_add_(1, self._labels_N[index_BK], (nearest_BK / self._temperature).exp())
