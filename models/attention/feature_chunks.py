"""Features of some tokens at a time, with their derivatives, for `chunked`.

Shape suffixes: B batch, H heads, N tokens, n tokens of a chunk, D head width, F features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
"""exp(x) = exp2(x LOG2_E), which torch computes three times as fast on a CPU."""


class Chunk(NamedTuple):
    """Some images, and some tokens of them."""

    images: slice
    tokens: slice
    everything: bool
    """These are all tokens of all images."""

    def of(self, x_BHND: Tensor) -> Tensor:
        """Return a view of these tokens."""
        return x_BHND if self.everything else x_BHND[self.images, :, self.tokens]

    def of_images(self, sums_BHFD: Tensor) -> Tensor:
        """Return a view of the sums of these images."""
        return sums_BHFD if self.everything else sums_BHFD[self.images]


class ChunkedFeatures(ABC):
    """Features of one chunk of tokens, without parameters; φ(x) is what the methods return plus `floor`.

    The methods get and return float32 or float64, and write what they return into `out`. One object serves one
    forward pass and its backward pass.
    """

    by_features = False
    """The gradients are functions of the features: they do not read the tokens, which are then not centered. The
    features are as wide as the tokens, which may be given in `out`."""
    rescaled = False
    """Sums of earlier chunks of keys get a factor, so the features of a chunk depend on the chunks before it."""

    def __init__(self, num_features: int, floor: float = 0.0) -> None:
        self.num_features, self.floor = num_features, floor
        self._scratch: dict[tuple[str, int, int, int], Tensor] = {}

    def scratch(self, name: str, like: Tensor, width: int | None = None) -> Tensor:
        """Return memory for tokens (B, H, n, width), kept from chunk to chunk so that it is in the cache.

        Its layout is (B, n, H, width), as a layer's, in which most steps run over the whole memory in one go. The
        tokens that a method gets may be in "first", a method may use "second".
        """
        width = width or like.shape[3]
        key = name, like.shape[0], like.shape[2], width
        if key not in self._scratch:
            self._scratch[key] = empty_tokens(like, width)
        return self._scratch[key]

    def release(self) -> None:
        """Free the memory of `scratch`."""
        self._scratch.clear()

    @abstractmethod
    def queries(self, x_BHnD: Tensor, chunk: Chunk, out: Tensor) -> Tensor:
        """Return φ(q) - floor, (B, H, n, F)."""

    @abstractmethod
    def keys(self, x_BHnD: Tensor, chunk: Chunk, out: Tensor) -> Tensor:
        """Return φ(k) - floor, (B, H, n, F)."""

    @abstractmethod
    def queries_gradient(
        self, x_BHnD: Tensor, features_BHnF: Tensor, grad_BHnF: Tensor, chunk: Chunk, out: Tensor
    ) -> None:
        """Write the gradient for the queries into `out`. It may overwrite `grad_BHnF`, but not the features."""

    @abstractmethod
    def keys_gradient(
        self, x_BHnD: Tensor, features_BHnF: Tensor, grad_BHnF: Tensor, chunk: Chunk, out: Tensor
    ) -> None:
        """Write the gradient for the keys into `out`. It may overwrite `grad_BHnF`, but not the features."""

    def first_keys(self, x_BHnD: Tensor, chunk: Chunk, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return `keys` in the forward pass, and a factor (B, H, 1, 1) for the sums of earlier chunks."""
        return self.keys(x_BHnD, chunk, out), None


def empty_tokens(like_BHND: Tensor, width: int) -> Tensor:
    """Return empty memory (B, H, N, width) for float32 or float64, in the layout of a layer, (B, N, H, width)."""
    batch, heads, tokens, _ = like_BHND.shape
    empty = like_BHND.new_empty((batch, tokens, heads, width), dtype=sum_dtype(like_BHND))
    return empty.transpose(1, 2)


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the type of features and sums of `x`."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32
