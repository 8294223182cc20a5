"""Nyströmformer: the softmax map approximated by three small maps, through landmarks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Geometry, Heads, LayerShape, LowRank, Term, Traits, check_steps, without_prefix
from .kernel import without_padding
from .kernels import precise
from .pooling import PooledAttention, Pooling, default_count, pooling_macs, small_map_attention
from .softmax import prefix_term, with_prefix


class Landmarks(NamedTuple):
    """Prefix tokens, then cells: queries and keys (B, H, M, D), log-counts (B or 1, 1, 1, M), Z."""

    q: Tensor
    k: Tensor
    log_counts: Tensor
    inverse: Tensor
    """(B, H, M, M)."""


class NystromAttention(PooledAttention):
    """A of grid queries: softmax(s Q K̃ᵀ + log c) Z softmax(s Q̃ Kᵀ) with Z ≈ softmax(s Q̃ K̃ᵀ + log c)⁺.

    Xiong et al. 2021 (arXiv 2102.03902). The landmarks Q̃, K̃ are the prefix tokens and the means of queries and keys
    over at most `num_landmarks` cells of the grid (default: a fifth of the patches, at most 64); c is the number of
    tokens of a landmark. The paper uses means of sequence segments, without prefix or counts. Prefix queries attend
    exactly. This is softmax attention with as many landmarks as patches and many iterations, or if the keys of each
    cell are equal.

    Z is iterated in float32, scaled for each image and head. Six iterations do not converge, which helps: the true
    pseudo-inverse has huge entries where landmarks are similar. More iterations are not better, and from 20 on the
    float32 rounding grows. A is signed, and its rows sum to one only approximately.

    4 N M D multiply-adds per head, and 4 M³ per iteration: more than softmax attention from about 46 landmarks at 197
    tokens. `local_size` is the side of a depthwise convolution of the values; 0 means no convolution.

    Raises ConfigError: an option is invalid.
    """

    def __init__(
        self,
        shape: LayerShape,
        num_landmarks: int | None = None,
        iterations: int = 6,
        local_size: int = 3,
    ) -> None:
        count = default_count(shape.geometry, 5, 64) if num_landmarks is None else num_landmarks
        super().__init__(shape, "num_landmarks", count, local_size)
        check_steps("iterations", iterations)
        self.iterations = iterations

    @property
    def traits(self) -> Traits:
        return Traits(nonnegative=False, row_stochastic=False, needs_grid=True, key_mask=True)

    def attend(self, heads: Heads) -> Tensor:
        v = heads.values()
        with torch.autocast(v.device.type, enabled=False):
            q, k = _precise(heads)
            landmarks = self._landmarks(heads)
            seen = small_map_attention(landmarks.q, k, v.to(k.dtype), heads.seen, heads.scale)
            grid = small_map_attention(
                without_prefix(q, heads.tokens()),
                landmarks.k,
                landmarks.inverse @ seen,
                landmarks.log_counts,
                heads.scale,
            )
        return with_prefix(heads, grid.to(v.dtype))

    def terms(self, heads: Heads) -> list[Term]:
        num_prefix = heads.tokens().num_prefix
        q, _ = heads.qk()
        with torch.autocast(q.device.type, enabled=False):
            q, k = _precise(heads)
            landmarks = self._landmarks(heads)
            to_landmarks = heads.scale * q[:, :, num_prefix:] @ landmarks.k.transpose(2, 3)
            left = (to_landmarks + landmarks.log_counts).softmax(-1) @ landmarks.inverse
            to_keys = heads.scale * landmarks.q @ k.transpose(2, 3)
            if heads.seen is not None:
                to_keys = to_keys.masked_fill(~heads.seen, -torch.inf)
            right = to_keys.softmax(-1).transpose(2, 3)
        return [prefix_term(heads), LowRank(F.pad(left, (0, 0, num_prefix, 0)), right)]

    def macs(self, geometry: Geometry) -> int:
        cells, tokens, patches = self.cells(geometry), geometry.num_tokens, geometry.num_patches
        count, width = geometry.num_prefix + cells[0] * cells[1], self.shape.head_dim
        maps = 2 * (patches + tokens + count) * count * width
        inverse = 4 * self.iterations * count**3
        pooling = 2 * pooling_macs(geometry, cells) * width
        return (maps + inverse + pooling) * self.shape.num_heads + self.macs_beside(geometry)

    def _landmarks(self, heads: Heads) -> Landmarks:
        cells, num_prefix = self.cells(heads.tokens()), heads.tokens().num_prefix
        tokens = [without_padding(x, heads) for x in _precise(heads)]
        pooling = Pooling(heads, cells, tokens[0])
        q, k = (pooling.means(x) for x in tokens)
        if num_prefix:
            q, k = (torch.cat((x[:, :, :num_prefix], y), 2) for x, y in zip(tokens, (q, k), strict=True))
        counts = pooling.log_counts()
        weights = (heads.scale * q @ k.transpose(2, 3) + counts).softmax(-1)
        return Landmarks(q, k, counts, pseudo_inverse(weights, self.iterations))


def pseudo_inverse(x: Tensor, iterations: int) -> Tensor:
    """Approximate the Moore-Penrose inverse of nonnegative matrices X (..., M, M) in `iterations` steps.

    Z ← ¼ Z (13 I − X Z (15 I − X Z (7 I − X Z))), from Z = Xᵀ / (‖X‖₁ ‖X‖∞) of each matrix (arXiv 2102.03902).
    Public versions use the largest norms of the batch, so that an image's result depends on the others.
    """
    norms = x.sum(-2).amax(-1) * x.sum(-1).amax(-1)
    inverse: Tensor = (x.transpose(-1, -2) / norms[..., None, None]).flatten(0, -3)
    matrices, eye = x.flatten(0, -3), torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    seven, fifteen, thirteen = (factor * eye for factor in (7, 15, 13))
    for _ in range(iterations):
        product = matrices @ inverse
        inner = torch.baddbmm(fifteen, product, seven - product, alpha=-1)
        inner = torch.baddbmm(thirteen, product, inner, alpha=-1)
        inverse = torch.baddbmm(eye, inverse, inner, beta=0, alpha=0.25)
    return inverse.view_as(x)


def _precise(heads: Heads) -> tuple[Tensor, Tensor]:
    q, k = heads.qk()
    return precise(q), precise(k)


OPERATORS = {"nystrom": NystromAttention}
