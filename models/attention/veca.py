"""Attention by learned cores: a few of them gather the tokens, and every token attends to what they gathered."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import AttentionOperator, Geometry, Heads, LayerShape, LowRank, Term, Traits, check_whole
from .kernels import precise
from .pooling import small_map_attention
from .softmax import softmax_rows


class CoreAttention(AttentionOperator):
    """A = softmax(s Q (P K)ᵀ) P with P = softmax(s L Kᵀ), (C, N), of C learned cores L in each head.

    The pattern of VECA (Song et al. 2026, arXiv 2605.12491): a token sees the cores, and the cores see all tokens.
    The paper's cores are tokens that pass through all layers, with projections and an MLP of their own, and see each
    other. A converted layer has no such tokens: its cores are parameters, drawn from the normal distribution, and
    what they gathered takes their place as keys and values. Prefix tokens take part as patches do. The map is
    nonnegative and its rows sum to one. No parameter depends on the grid. 5 N C D multiply-adds per head.

    Raises ConfigError: `num_cores` is not a whole number above 0.
    """

    def __init__(self, shape: LayerShape, num_cores: int = 16) -> None:
        super().__init__(shape)
        check_whole("num_cores", num_cores)
        self.cores = nn.Parameter(torch.randn(shape.num_heads, num_cores, shape.head_dim))

    @property
    def traits(self) -> Traits:
        return Traits(key_mask=True, graph_any_grid=True)

    def attend(self, heads: Heads) -> Tensor:
        q, k, v = heads.qkv()
        gathering = self._gathering(heads).to(v.dtype)
        return small_map_attention(q, gathering @ k, gathering @ v, None, heads.scale)

    def terms(self, heads: Heads) -> list[Term]:
        q, k = heads.qk()
        gathering = self._gathering(heads)
        logits = heads.scale * precise(q) @ (gathering @ precise(k)).transpose(2, 3)
        return [LowRank(logits.softmax(-1), gathering.transpose(2, 3))]

    def macs(self, geometry: Geometry) -> int:
        return 5 * geometry.num_tokens * self.cores.numel()

    def _gathering(self, heads: Heads) -> Tensor:
        """Return P, (B, H, C, N), in float32 or better."""
        _, k = heads.qk()
        cores = self.cores.expand(k.shape[0], -1, -1, -1)
        return softmax_rows(heads.with_qkv(cores, k, heads.values()), slice(None))


OPERATORS = {"veca": CoreAttention}
