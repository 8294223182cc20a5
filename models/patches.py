"""From images to patches: unfold, normalize, and fixed positions on a grid of any shape."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ConfigError


def unfold_patches(images_BCHW: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches, row by row: (B, N, K) with K ordered (height, width, channel) in a patch.

    Raises:
        ConfigError: height or width is not a multiple of the patch.
    """
    batch, channels, height, width = images_BCHW.shape
    ph, pw = patch_size
    if height % ph or width % pw:
        raise ConfigError(f"Images of {height}x{width} pixels cannot be cut into patches of {ph}x{pw}.")
    x = images_BCHW.reshape(batch, channels, height // ph, ph, width // pw, pw)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // ph) * (width // pw), ph * pw * channels)


def normalize_patches(patches_BNK: Tensor) -> Tensor:
    """Subtract its mean from each patch, and divide by its deviation sqrt(var + 1e-6)."""
    mean_BN1 = patches_BNK.mean(dim=-1, keepdim=True)
    deviation_BN1 = (patches_BNK.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return (patches_BNK - mean_BN1) / deviation_BN1


def grid_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Return sine and cosine positions of a (rows, columns) grid: (1, rows * columns, dim); `dim` is a multiple of 4.

    A quarter each of sin(row w), cos(row w), sin(column w), cos(column w), with w = 10000^(-i / (dim / 4)).
    """
    quarter = dim // 4
    frequency = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (rows, columns)]
    parts = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float().unsqueeze(0)
