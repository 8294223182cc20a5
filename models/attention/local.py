"""The local term of an operator: a depthwise convolution on the token grid that starts at zero."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .base import Geometry, LayerShape


class DepthwiseConv(nn.Module):
    """A convolution of each channel of each head with its own `size` x `size` weights, without bias.

    Prefix tokens are not on the grid: they contribute nothing and get zeros. The weights start at zero, so a
    conversion starts without the local term.

    Raises ConfigError: `size` is not an odd number.
    """

    def __init__(self, shape: LayerShape, size: int) -> None:
        super().__init__()
        if not isinstance(size, int) or size < 1 or size % 2 == 0:
            raise ConfigError(f"plan: local_size={size} is not an odd number, such as 3 or 5")
        self.size = size
        self.weight = nn.Parameter(torch.zeros(shape.num_heads * shape.head_dim, 1, size, size))

    def forward(self, x_BHND: Tensor, geometry: Geometry) -> Tensor:
        """Return (B, H, N, D) in the dtype of the input."""
        grid_BHnD = x_BHND[:, :, geometry.num_prefix :]
        batch, heads, _, width = grid_BHnD.shape
        image = grid_BHnD.transpose(2, 3).reshape(batch, heads * width, *geometry.grid)
        weight = self.weight.to(x_BHND.dtype)
        local = F.conv2d(image, weight, padding=self.size // 2, groups=heads * width)
        local_BHnD = local.to(x_BHND.dtype).reshape(batch, heads, width, -1).transpose(2, 3)
        return F.pad(local_BHnD, (0, 0, geometry.num_prefix, 0))

    def macs(self, geometry: Geometry) -> int:
        """Return the multiply-adds of one image."""
        return geometry.num_patches * self.weight.numel()
