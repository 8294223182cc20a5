"""Linformer: softmax attention over fewer keys, which are learned weighted sums of all keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, did_you_mean
from .base import AttentionOperator, Geometry, Heads, LayerShape, LowRank, Term, Traits, without_prefix
from .pooling import cells_of, check_count, default_count, mean_weights, small_map_attention
from .softmax import prefix_term, with_prefix

SHARING = ("headwise", "key-value", "layerwise")
SPREAD = 0.01
"""The share of a softmax row that is spread over all tokens at the start, so that no weight is zero."""


class LinformerAttention(AttentionOperator):
    """A of grid queries: softmax(s Q [K_P; E K]ᵀ + log c) [I_P; F] (Wang et al. 2020, arXiv 2006.04768, eq. 7).

    E and F (M, n) pool the grid tokens. They start as means over at most `num_keys` cells of the grid (default: a
    quarter of the patches, at most 128; the paper uses a quarter of 512 and 1,024 tokens). K_P are the keys of the
    prefix tokens, which every query sees exactly; prefix queries attend exactly. c = (Σ e)² / Σ e² is the effective
    number of tokens of a row e of E: 1 for a prefix token, the number of tokens for a cell. With E = F = I this is
    softmax attention.

    `sharing`: headwise has E and F in each layer, for all heads; key-value has E = F; layerwise has one E = F for all
    layers with the same options, stored in the first. With `stochastic`, rows of E and F are softmaxes of parameters,
    so the map is nonnegative and its rows sum to one. Without it, training breaks both properties. For another grid
    the rows are interpolated as images. 4 N M D multiply-adds per head.

    Raises ConfigError: an option is invalid.
    """

    key_pooling: nn.Parameter | None
    value_pooling: nn.Parameter | None

    def __init__(
        self,
        shape: LayerShape,
        num_keys: int | None = None,
        sharing: str = "headwise",
        stochastic: bool = False,
    ) -> None:
        super().__init__(shape)
        if sharing not in SHARING:
            raise ConfigError(f"plan: sharing={sharing}; {did_you_mean(str(sharing), SHARING)}")
        if not isinstance(stochastic, bool):
            raise ConfigError(f"plan: stochastic={stochastic}; valid: true, false")
        count = default_count(shape.geometry, 4, 128) if num_keys is None else num_keys
        check_count("num_keys", count, shape.geometry)
        self.sharing, self.stochastic = sharing, stochastic
        means = mean_weights(shape.geometry, cells_of(count, shape.geometry))
        self.num_keys = len(means)
        start = self._learned((1 - SPREAD) * means + SPREAD / means.shape[1] if stochastic else means)
        self.key_pooling = nn.Parameter(start)
        self.value_pooling = nn.Parameter(start.clone()) if sharing == "headwise" else None
        self._first: tuple[LinformerAttention, ...] = ()

    @property
    def traits(self) -> Traits:
        return Traits(
            nonnegative=self.stochastic,
            row_stochastic=self.stochastic,
            needs_grid=True,
            resolution="resampled",
        )

    def share(self, first: AttentionOperator) -> None:
        if self.sharing == "layerwise" and isinstance(first, LinformerAttention):
            self.key_pooling = None
            self.borrows = True
            self._first = (first,)  # in a tuple, so that it is not registered a second time

    def attend(self, heads: Heads) -> Tensor:
        q, k, v = heads.qkv()
        geometry = heads.tokens()
        num_prefix = geometry.num_prefix
        keys_Mn, values_Mn = self.pooling(geometry)
        keys, values = _pooled(keys_Mn, k, num_prefix), _pooled(values_Mn, v, num_prefix)
        counts = _log_counts(keys_Mn, num_prefix).to(q.dtype)[None, None, None]
        grid = small_map_attention(without_prefix(q, geometry), keys, values, counts, heads.scale)
        return with_prefix(heads, grid)

    def terms(self, heads: Heads) -> list[Term]:
        q, k = heads.qk()
        geometry = heads.tokens()
        num_prefix, precise = geometry.num_prefix, torch.promote_types(q.dtype, torch.float32)
        keys_Mn, values_Mn = self.pooling(geometry)
        keys = _pooled(keys_Mn, k.to(precise), num_prefix)
        logits = heads.scale * q[:, :, num_prefix:].to(precise) @ keys.transpose(2, 3)
        left = (logits + _log_counts(keys_Mn, num_prefix).to(precise)).softmax(-1)
        itself = torch.eye(num_prefix, dtype=values_Mn.dtype, device=values_Mn.device)
        right = torch.block_diag(itself, values_Mn.T).to(precise).expand(*q.shape[:2], -1, -1)
        return [prefix_term(heads), LowRank(F.pad(left, (0, 0, num_prefix, 0)), right)]

    def macs(self, geometry: Geometry) -> int:
        count, prefix, patches = self.num_keys, geometry.num_prefix, geometry.num_patches
        maps = 2 * patches * (count + prefix) + 2 * prefix * geometry.num_tokens
        pooling = 2 * patches * count
        return (maps + pooling) * self.shape.head_dim * self.shape.num_heads

    def pooling(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Return E and F, (M, n), for this grid, in float32 or better."""
        kept = self._first[0] if self._first else self
        assert kept.key_pooling is not None
        keys = kept._at(geometry, kept.key_pooling)
        return keys, keys if kept.value_pooling is None else kept._at(geometry, kept.value_pooling)

    @torch.no_grad()
    def resample(self, geometry: Geometry) -> None:
        for name in ("key_pooling", "value_pooling"):
            old = getattr(self, name)
            if old is not None:
                new = self._learned(self._at(geometry, old)).to(old.dtype)
                setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))
        super().resample(geometry)

    def _at(self, geometry: Geometry, learned: Tensor) -> Tensor:
        """Return the rows of weights for this grid, from the parameters for the layer's own grid."""
        precise = learned.to(torch.promote_types(learned.dtype, torch.float32))
        rows = precise.softmax(-1) if self.stochastic else precise
        old = self.shape.geometry.grid
        if geometry.grid == old:
            return rows
        rows = interpolated(rows, old, geometry.grid)
        return rows / rows.sum(-1, keepdim=True) if self.stochastic else rows

    def _learned(self, rows: Tensor) -> Tensor:
        """Return the parameter that produces these rows."""
        return rows.log() if self.stochastic else rows


def interpolated(rows_Mn: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate each row as an image, times n_old / n_new so that its sum stays the same."""
    images = rows_Mn.reshape(1, -1, *old)
    resized = F.interpolate(images, size=new, mode="bilinear", align_corners=False, antialias=True)
    return resized[0].flatten(1) * (math.prod(old) / math.prod(new))


def _pooled(weights_Mn: Tensor, x_BHND: Tensor, num_prefix: int) -> Tensor:
    """Return the prefix tokens and weighted sums of the grid tokens, (B, H, P + M, D) in the dtype of the input."""
    # One product for all heads: in the layout of a layer, all channels of a token are adjacent.
    grid_BnC = (x_BHND[:, :, num_prefix:] if num_prefix else x_BHND).transpose(1, 2).flatten(2)
    # matmul would compute the transpose of the product, which is slower. An export with any batch has no len().
    pooled_BMC = torch.bmm(weights_Mn.to(x_BHND.dtype).expand(x_BHND.shape[0], -1, -1), grid_BnC)
    pooled = pooled_BMC.unflatten(2, (x_BHND.shape[1], -1)).transpose(1, 2).to(x_BHND.dtype)
    return torch.cat((x_BHND[:, :, :num_prefix], pooled), 2) if num_prefix else pooled


def _log_counts(weights_Mn: Tensor, num_prefix: int) -> Tensor:
    """Return log c of the keys (P + M,): 0 for prefix tokens; a row with a small sum counts as one token."""
    smallest = torch.finfo(weights_Mn.dtype).tiny
    spread = weights_Mn.sum(-1).square() / weights_Mn.square().sum(-1).clamp_min(smallest)
    counts = spread.clamp_min(1).log()
    return F.pad(counts, (num_prefix, 0)) if num_prefix else counts


OPERATORS = {"linformer": LinformerAttention}
