"""Resample position embeddings to another resolution.

`timm`: bicubic with antialiasing, `timm.layers.resample_abs_pos_embed`. `mae`: plain bicubic with
`align_corners=False`, as MAE's fine-tuning code does for square grids. The two differ slightly where a
grid shrinks.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

Grid = tuple[int, int]
Method = Literal["timm", "mae"]


def resample_position(position_1ND: Tensor, old: Grid, new: Grid, num_prefix: int, method: Method) -> Tensor:
    """Return embeddings (1, num_prefix + H W, D) of the grid `old` on the grid `new`; prefix tokens stay.

    Computed in float32 and returned in the dtype given.
    """
    if old == new:
        return position_1ND
    if method == "timm":
        resampled: Tensor = resample_abs_pos_embed(position_1ND, list(new), list(old), num_prefix)
        return resampled
    prefix_1PD, patches_1ND = position_1ND[:, :num_prefix], position_1ND[:, num_prefix:]
    grid_1DHW = patches_1ND.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    resized_1DHW = F.interpolate(grid_1DHW, size=new, mode="bicubic", align_corners=False)
    resized_1ND = resized_1DHW.flatten(2).transpose(1, 2).to(position_1ND.dtype)
    return torch.cat([prefix_1PD, resized_1ND], dim=1)


def find_grid(num_patches: int, declared: Grid | None) -> Grid | None:
    """Return the grid of `num_patches`: the declared one if it has that many, else a square, else None."""
    if declared is not None and declared[0] * declared[1] == num_patches:
        return declared
    side = math.isqrt(max(num_patches, 0))
    return (side, side) if side and side * side == num_patches else None
