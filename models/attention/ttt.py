"""TTT-SwiGLU: one gradient step trains a small network on keys and values, which is then applied to the queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import AttentionOperator, Geometry, Heads, LayerShape, Traits
from .local import DepthwiseConv

NORM_EPSILON = 1.0
KERNEL = 3
INITIAL_STD = 0.02


class InnerWeights(NamedTuple):
    """W₁, W₂ and W₃ of the inner network, each (H, D, D), or (B, H, D, D) after its step."""

    gated: Tensor
    linear: Tensor
    out: Tensor


class TTTAttention(AttentionOperator):
    """o_i = f_{W − g}(q_i) with f_W(x) = (silu(x W₁) ⊙ x W₂) W₃ and g = ∂/∂W of −(s/N) Σ_j v_j · f_W(k_j).

    Test-time training (Sun et al. 2024, arXiv 2407.04620) with a SwiGLU of D x D matrices per head and one closed-form
    step on the inner product, as in the conversion of DeiT to linear time ("T5", ICML 2026); its predecessor is ViT³
    (arXiv 2512.01643). Keys are normalized over the tokens, per channel, with 1 added to the variance, because the
    large common mean of pretrained keys would dominate the step. Queries and keys get a zero-initialized depthwise
    3 x 3 convolution of themselves, without the published bias. Prefix tokens are not on the grid: they skip the
    convolution and are otherwise ordinary tokens. 9 N D² multiply-adds per head, and 18 N D for the convolutions.

    It is not linear in V, so it has no map. The values must be as wide as the queries.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        size = (shape.num_heads, shape.head_dim, shape.head_dim)
        self.gated, self.linear, self.out = (nn.Parameter(_draw(size)) for _ in range(3))
        self.q_conv, self.k_conv = (DepthwiseConv(shape, KERNEL) for _ in range(2))

    @property
    def traits(self) -> Traits:
        return Traits(
            linear_in_v=False, nonnegative=False, row_stochastic=False, needs_grid=True, graph_any_grid=True
        )

    def attend(self, heads: Heads) -> Tensor:
        q, k, v = heads.qkv()
        precise = torch.promote_types(v.dtype, torch.float32)
        with torch.autocast(v.device.type, enabled=False):
            queries, keys = q.to(precise), normalized_keys(k.to(precise))
            queries = queries + self.q_conv(queries, heads.tokens())
            keys = keys + self.k_conv(keys, heads.tokens())
            weights = InnerWeights(*(weight.to(precise) for weight in (self.gated, self.linear, self.out)))
            learned = inner_step(weights, keys, v.to(precise) * (heads.scale / v.shape[2]))
            return answer(learned, queries).to(v.dtype)

    def macs(self, geometry: Geometry) -> int:
        width = self.shape.head_dim
        learning = geometry.num_tokens * 9 * width**2
        mixing = self.q_conv.macs(geometry) + self.k_conv.macs(geometry)
        return learning * self.shape.num_heads + mixing


def normalized_keys(k_BHND: Tensor) -> Tensor:
    """Subtract the mean over the tokens from the keys, and divide by sqrt(variance + 1)."""
    variance, mean = torch.var_mean(k_BHND, dim=2, correction=0, keepdim=True)
    return (k_BHND - mean) * (variance + NORM_EPSILON).rsqrt()


def inner_step(weights: InnerWeights, k_BHND: Tensor, v_BHND: Tensor) -> InnerWeights:
    """Return the weights after one gradient step on −Σ_j v_j · f_W(k_j), in closed form."""
    gate, linear = k_BHND @ weights.gated, k_BHND @ weights.linear
    sigmoid = gate.sigmoid()
    gated = gate * sigmoid
    hidden = v_BHND @ weights.out.transpose(-1, -2)
    slope = sigmoid + gated * (1 - sigmoid)  # of silu
    keys_BHDN = k_BHND.transpose(2, 3)
    return InnerWeights(
        weights.gated + keys_BHDN @ (hidden * linear * slope),
        weights.linear + keys_BHDN @ (hidden * gated),
        weights.out + (gated * linear).transpose(2, 3) @ v_BHND,
    )


def answer(weights: InnerWeights, x_BHND: Tensor) -> Tensor:
    """Return f_W(x) = (silu(x W₁) ⊙ x W₂) W₃."""
    return (F.silu(x_BHND @ weights.gated) * (x_BHND @ weights.linear)) @ weights.out


def _draw(size: tuple[int, ...]) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(size), std=INITIAL_STD)


OPERATORS = {"ttt": TTTAttention}
