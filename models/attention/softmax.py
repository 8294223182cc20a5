"""Softmax attention, the reference for every other operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import QKV, AttentionOperator, Geometry, Heads, Traits
from .kernels import precise
from .operations import Accounting, Operations
from .terms import FirstRows, Term


class Softmax:
    """softmax(s Q Kᵀ + bias) V, by torch's fused attention."""

    needs = QKV

    def __call__(self, heads: Heads) -> Tensor:
        q, k, v = heads.qkv()
        # torch's own default differs from D ** -0.5 in the last bit; timm relies on the default.
        scale = None if heads.scale == q.shape[-1] ** -0.5 else heads.scale
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=_mask(heads), dropout_p=heads.dropout, scale=scale
        )


class SoftmaxAttention(AttentionOperator):
    """Softmax attention as an operator of a converted layer: 2 N² D multiply-adds per head."""

    @property
    def traits(self) -> Traits:
        return Traits(linear_cost=False, key_mask=True, bias=True, dropout=True, graph_any_grid=True)

    def attend(self, heads: Heads) -> Tensor:
        return Softmax()(heads)

    def terms(self, heads: Heads) -> list[Term]:
        return [FirstRows(softmax_rows(heads, slice(None)))]

    def rows(self, heads: Heads, index: Tensor) -> Tensor:
        return softmax_rows(heads, index)

    def macs(self, geometry: Geometry) -> int:
        return 2 * geometry.num_tokens**2 * self.shape.head_dim * self.shape.num_heads

    def operations(self, geometry: Geometry, accounting: Accounting = "true") -> Operations:
        scaled = self.shape.num_heads * geometry.num_tokens**2 if accounting == "published" else 0
        return Operations(self.macs(geometry) + scaled, self.macs(geometry))


def softmax_rows(heads: Heads, index: Tensor | slice) -> Tensor:
    """Return rows of softmax(s Q Kᵀ + bias), (B, H, S, N), in float32 or better."""
    q, k = heads.qk()
    logits = heads.scale * precise(q[:, :, index]) @ precise(k).transpose(2, 3)
    mask = _mask(heads)
    if mask is not None:
        mask = mask if mask.shape[-2] == 1 else mask[..., index, :]
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1)


def _mask(heads: Heads) -> Tensor | None:
    """Return the bias, with minus infinity at padding keys."""
    if heads.seen is None or heads.bias is None:
        return heads.bias if heads.seen is None else heads.seen
    return heads.bias.masked_fill(~heads.seen, -torch.inf)
