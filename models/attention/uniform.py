"""Uniform attention: every token takes the mean of all values."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import AttentionOperator, Geometry, Heads, Traits
from .terms import LowRank, Term


class UniformAttention(AttentionOperator):
    """A = 1/N, without queries, keys or parameters: the lower baseline for other operators.

    Tokens still exchange their mean, so a network with it is more than MLPs on single tokens.
    """

    needs = ("v",)

    @property
    def traits(self) -> Traits:
        return Traits(key_mask=True, graph_any_grid=True)

    def attend(self, heads: Heads) -> Tensor:
        v = heads.values()
        if heads.key_mask is None:
            return v.mean(2, keepdim=True).expand_as(v)  # torch sums half precision in float32
        return (_weights(heads) * v).sum(2, keepdim=True).to(v.dtype).expand_as(v)

    def terms(self, heads: Heads) -> list[Term]:
        v, weights = heads.values(), _weights(heads)
        right = weights.expand(*v.shape[:3], 1).to(v.dtype)
        return [LowRank(torch.ones_like(right), right)]

    def macs(self, geometry: Geometry) -> int:
        return geometry.num_tokens * self.shape.head_dim * self.shape.num_heads


def _weights(heads: Heads) -> Tensor:
    """Return the weight of each key, (B or 1, 1, N, 1), in float32 or better: equal for all but padding."""
    v = heads.values()
    dtype = torch.promote_types(v.dtype, torch.float32)
    if heads.key_mask is None:
        return v.new_full((1, 1, v.shape[2], 1), 1 / v.shape[2], dtype=dtype)
    keys = heads.key_mask[:, None, :, None].to(dtype)
    return keys / keys.sum(2, keepdim=True)
