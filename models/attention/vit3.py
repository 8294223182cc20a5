"""ViT³: one gradient step trains two small networks on keys and values, which are then applied to the queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import AttentionOperator, Geometry, Heads, LayerShape, Traits, without_prefix
from .kernels import precise
from .local import convolve_each, neighbors, to_image, to_tokens

SIZE = 3
RATE = 1 / 3
INITIAL_STD = 0.02


class ViT3Attention(AttentionOperator):
    """o_i = f_{W + c(g)}(q_i) with g = (r/N) ∂/∂W Σ_j v_j · f_W(k_j), r = 1/3 and c(g) = g / (‖g‖ + 1).

    Test-time training with two inner networks (Han et al. 2025, arXiv 2512.01643): f(x) = x W₁ ⊙ silu(x W₂) with D x D
    matrices, c(g) column by column, and, in one head, a depthwise 3 x 3 convolution, c(g) channel by channel. r is that
    of the released code, the number of weights of a channel to the power -1/2. There the convolution is one more head
    with projections of its own. Operators get those of the layer alone, so here it is the last head; a layer of one
    head has none. Prefix tokens are not on the grid: the convolution meets them with its middle weight alone, which
    the step learns from the grid. 6 N D² multiply-adds for each other head, and 18 n D for the last.

    It is not linear in V, so it has no map. The values must be as wide as the queries.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.has_conv, width = shape.num_heads > 1, shape.head_dim
        self.matrices = shape.num_heads - self.has_conv
        self.linear, self.gated = (_draw(self.matrices, width, width) for _ in range(2))
        self.taps = _draw(width, 1, SIZE, SIZE) if self.has_conv else None

    @property
    def traits(self) -> Traits:
        return Traits(
            linear_in_v=False, nonnegative=False, row_stochastic=False, needs_grid=True, graph_any_grid=True
        )

    def attend(self, heads: Heads) -> Tensor:
        q, k, v = heads.qkv()
        with torch.autocast(v.device.type, enabled=False):
            parts = [precise(x).split([self.matrices, int(self.has_conv)], 1) for x in (q, k, v)]
            (q_BhND, q_B1ND), (k_BhND, k_B1ND), (v_BhND, v_B1ND) = parts
            out = answer(q_BhND, *self._matrices_after(k_BhND, v_BhND))
            if self.taps is not None:
                out = torch.cat([out, self._convolve(q_B1ND, k_B1ND, v_B1ND, heads.tokens())], 1)
        return out.to(v.dtype)

    def macs(self, geometry: Geometry) -> int:
        width = self.shape.head_dim
        learning = 6 * geometry.num_tokens * width**2 * self.matrices
        return learning + 2 * SIZE**2 * geometry.num_patches * width * self.has_conv

    def _matrices_after(self, k_BHND: Tensor, v_BHND: Tensor) -> tuple[Tensor, Tensor]:
        """Return W₁ and W₂ after the step, (B, H, D, D)."""
        linear, gated = self.linear.to(k_BHND.dtype), self.gated.to(k_BHND.dtype)
        gate, values = k_BHND @ gated, v_BHND * (RATE / k_BHND.shape[2])
        sigmoid, keys_BHDN = gate.sigmoid(), k_BHND.mT
        silu = gate * sigmoid
        slope = sigmoid + silu * (1 - sigmoid)
        of_linear = keys_BHDN @ (values * silu)
        of_gated = keys_BHDN @ (values * (k_BHND @ linear) * slope)
        return linear + clipped(of_linear, (2,)), gated + clipped(of_gated, (2,))

    def _convolve(self, q_B1ND: Tensor, k_B1ND: Tensor, v_B1ND: Tensor, geometry: Geometry) -> Tensor:
        """Return the output of the head with the convolution."""
        assert self.taps is not None
        values = to_image(v_B1ND, geometry) * (RATE / geometry.num_patches)
        moved = neighbors(to_image(k_B1ND, geometry), SIZE)
        step_BCt = torch.stack([(keys * values).sum((2, 3)) for keys in moved], 2)
        taps = self.taps.to(step_BCt.dtype) + clipped(step_BCt, (2,)).unflatten(2, (1, SIZE, SIZE))
        out = to_tokens(convolve_each(to_image(q_B1ND, geometry), taps), 1, geometry)
        prefix = geometry.num_prefix
        if not prefix:
            return out
        middle = taps[:, :, 0, SIZE // 2, SIZE // 2][:, None, None]
        return torch.cat([q_B1ND[:, :, :prefix] * middle, without_prefix(out, geometry)], 2)


def clipped(step: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return g / (‖g‖ + 1)."""
    return step / (torch.linalg.vector_norm(step, dim=dims, keepdim=True) + 1)


def answer(x_BHND: Tensor, linear: Tensor, gated: Tensor) -> Tensor:
    """Return x W₁ ⊙ silu(x W₂)."""
    return (x_BHND @ linear) * F.silu(x_BHND @ gated)


def _draw(*size: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(size), std=INITIAL_STD))


OPERATORS = {"vit3": ViT3Attention}
