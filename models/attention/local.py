"""Depthwise convolutions on the token grid: the local term of an operator starts at zero in a conversion."""

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
        image = to_image(x_BHND, geometry)
        weight, bias = self.weight.to(x_BHND.dtype), None if self.bias is None else self.bias.to(x_BHND.dtype)
        local = F.conv2d(image, weight, bias, padding=self.size // 2, groups=len(weight)).to(x_BHND.dtype)
        return to_tokens(local, x_BHND.shape[1], geometry)

    def start_fresh(self) -> None:
        """Draw the weights and the bias as torch does for a convolution."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / self.size, 1 / self.size)

    def macs(self, geometry: Geometry) -> int:
        """Return the multiply-adds of one image."""
        return geometry.num_patches * self.weight.numel()


def to_image(x_BHND: Tensor, geometry: Geometry) -> Tensor:
    """Return the grid tokens as an image (B, H·D, height, width).

    In the layout of a layer it is a view, in the format of channels last.
    """
    grid_BHnD = without_prefix(x_BHND, geometry)
    batch, heads, _, width = grid_BHnD.shape
    return grid_BHnD.transpose(1, 2).reshape(batch, *geometry.grid, heads * width).permute(0, 3, 1, 2)


def to_tokens(image_BChw: Tensor, num_heads: int, geometry: Geometry) -> Tensor:
    """Return an image as tokens (B, H, N, D), with zeros at prefix tokens."""
    batch, channels = image_BChw.shape[:2]
    tokens = image_BChw.permute(0, 2, 3, 1).reshape(batch, -1, num_heads, channels // num_heads)
    prefix = geometry.num_prefix
    return F.pad(tokens.transpose(1, 2), (0, 0, prefix, 0)) if prefix else tokens.transpose(1, 2)


def neighbors(image_BChw: Tensor, size: int) -> list[Tensor]:
    """Return the image moved by each tap of a `size` x `size` convolution, row by row, with zeros outside."""
    height, width = image_BChw.shape[2:]
    padded = F.pad(image_BChw, (size // 2,) * 4)
    return [
        padded[:, :, down : down + height, right : right + width]
        for down in range(size)
        for right in range(size)
    ]


def convolve_each(image_BChw: Tensor, weight_BC1kk: Tensor) -> Tensor:
    """Convolve each channel of each image with weights of its own."""
    size = weight_BC1kk.shape[4]
    if image_BChw.device.type == "cpu" and not torch.compiler.is_compiling():
        # One image at a time: as groups of one convolution the images lose the fast kernels of channels last.
        return torch.cat([
            F.conv2d(image[None], weight, padding=size // 2, groups=len(weight))
            for image, weight in zip(image_BChw, weight_BC1kk, strict=True)
        ])  # fmt: skip
    taps_BCk11 = weight_BC1kk.flatten(2)[..., None, None]
    moved = neighbors(image_BChw, size)
    return sum((x * taps_BCk11[:, :, tap] for tap, x in enumerate(moved)), torch.zeros_like(image_BChw))


REDUCTION = 8


class DynamicConv(nn.Module):
    """A depthwise convolution with weights w + W₂ silu(W₁ v̄) for each image, where v̄ is its mean value, of all heads.

    JetViT (Zou et al. 2026, arXiv 2605.26636): its squeezed dynamic convolution. W₁ makes H D / 8 numbers and W₂ the
    weights of all channels. w and W₂ start at zero.

    Raises ConfigError: as `DepthwiseConv`.
    """

    def __init__(self, shape: LayerShape, size: int) -> None:
        super().__init__()
        self.static = DepthwiseConv(shape, size)
        channels = shape.num_heads * shape.head_dim
        self.squeeze = nn.Linear(channels, max(1, channels // REDUCTION), bias=False)
        self.generate = nn.Linear(self.squeeze.out_features, self.static.weight.numel(), bias=False)
        nn.init.zeros_(self.generate.weight)

    def forward(self, x_BHND: Tensor, mean_BH1D: Tensor, geometry: Geometry) -> Tensor:
        """Return (B, H, N, D) in the dtype of the input, with zeros at prefix tokens."""
        generated = self.generate(F.silu(self.squeeze(mean_BH1D.flatten(1))))
        weight_BC1kk = self.static.weight + generated.unflatten(1, self.static.weight.shape)
        local = convolve_each(to_image(x_BHND, geometry), weight_BC1kk.to(x_BHND.dtype))
        return to_tokens(local.to(x_BHND.dtype), x_BHND.shape[1], geometry)

    def macs(self, geometry: Geometry) -> int:
        """Return the multiply-adds of one image."""
        return self.static.macs(geometry) + self.squeeze.weight.numel() + self.generate.weight.numel()
