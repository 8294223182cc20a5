"""The local term of an operator: a depthwise convolution on the token grid that starts at zero in a conversion."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .base import Geometry, LayerShape, without_prefix

ANY_GRID = 7
"""A side up to this is valid on every grid: one plan is for all stages of a pyramid, whose last may have one token."""


def local_convolution(shape: LayerShape, size: int, *, bias: bool = False) -> DepthwiseConv | None:
    """Return a convolution of this side, or None for 0. Raises ConfigError as `DepthwiseConv`."""
    return None if size == 0 and not isinstance(size, bool) else DepthwiseConv(shape, size, bias=bias)


class DepthwiseConv(nn.Module):
    """A convolution of each channel of each head with its own `size` x `size` weights, without `bias` unless given.

    Prefix tokens are not on the grid: they contribute nothing and get zeros. The weights start at zero, so a
    conversion starts without the local term; `start_fresh` draws them as torch draws those of a convolution.

    Raises ConfigError: `size` is not an odd number, or the outer weights can never meet two tokens of the grid.
    """

    def __init__(self, shape: LayerShape, size: int, *, bias: bool = False) -> None:
        super().__init__()
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size % 2 == 0:
            raise ConfigError(f"plan: local_size={size} is not an odd number, such as 3 or 5")
        height, width = shape.geometry.grid
        largest = max(2 * max(height, width) - 1, ANY_GRID)
        if size > largest:
            raise ConfigError(
                f"plan: local_size={size} reaches beyond the grid of {height}x{width} tokens; valid are odd numbers up "
                f"to {largest}"
            )
        self.size = size
        channels = shape.num_heads * shape.head_dim
        self.weight = nn.Parameter(torch.zeros(channels, 1, size, size))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x_BHND: Tensor, geometry: Geometry) -> Tensor:
        """Return (B, H, N, D) in the dtype of the input."""
        grid_BHnD = without_prefix(x_BHND, geometry)
        batch, heads, _, width = grid_BHnD.shape
        # In the layout of a layer this image is a view, in the format of channels last.
        image = grid_BHnD.transpose(1, 2).reshape(batch, *geometry.grid, heads * width).permute(0, 3, 1, 2)
        weight, bias = self.weight.to(x_BHND.dtype), None if self.bias is None else self.bias.to(x_BHND.dtype)
        local = F.conv2d(image, weight, bias, padding=self.size // 2, groups=heads * width).to(x_BHND.dtype)
        local_BHnD = local.permute(0, 2, 3, 1).reshape(batch, -1, heads, width).transpose(1, 2)
        prefix = geometry.num_prefix
        return F.pad(local_BHnD, (0, 0, prefix, 0)) if prefix else local_BHnD

    def start_fresh(self) -> None:
        """Draw the weights and the bias as torch does for a convolution."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / self.size, 1 / self.size)

    def macs(self, geometry: Geometry) -> int:
        """Return the multiply-adds of one image."""
        return geometry.num_patches * self.weight.numel()
