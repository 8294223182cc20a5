"""Patches of a student and of any teacher on one grid, so that their features can be compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...models.attention.kernels import precise
from ...models.errors import TransferError
from ...models.families import family_of

Grid = tuple[int, int]
"""Rows and columns."""


def student_patches(student: nn.Module, tokens_BNC: Tensor, images: Grid) -> Tensor:
    """Return the patches after the final norm, of a pyramid those of its last stage, as (B, rows, columns, C).

    Raises TransferError: the student dropped patches.
    """
    family = family_of(student)
    geometry = family.geometries(student, images)[-1]
    if family.is_pyramid:
        return family.patches(tokens_BNC, geometry)
    grid = geometry.grid
    patches = tokens_BNC[:, int(getattr(student, "num_prefix_tokens", 0)) :]
    if patches.shape[1] != grid[0] * grid[1]:
        raise TransferError(
            f"transfer.tokens=patches needs all {grid[0]}x{grid[1]} patches of the student, and it has "
            f"{patches.shape[1]}: set student.model_args.patch_drop_rate to 0"
        )
    found: Tensor = patches.unflatten(1, grid)
    return found


def teacher_patches(patches: Tensor, student: Grid) -> Tensor:
    """Return a teacher's patches as (B, rows, columns, C).

    A teacher that gives (B, N, C) does not say how its patches lie: they are taken to lie as the student's.

    Raises TransferError: it has another number of patches.
    """
    if patches.dim() == 4:
        return patches
    if patches.shape[1] != student[0] * student[1]:
        raise TransferError(
            f"the teacher gives {patches.shape[1]} patches without their grid, and the student has "
            f"{student[0]}x{student[1]}: use another teacher, img_size that makes them equal, or tokens=pooled"
        )
    found: Tensor = patches.unflatten(1, student)
    return found


def common_grid(one: Grid, other: Grid) -> Grid:
    """Return the coarser of two grids, side by side."""
    return min(one[0], other[0]), min(one[1], other[1])


def average_to(patches_BhwC: Tensor, grid: Grid) -> Tensor:
    """Return the patches averaged over the area of each cell of a coarser `grid`, in float32.

    Two small matrix products: their backward pass is deterministic on every device.
    """
    patches = precise(patches_BhwC)
    rows, columns = patches.shape[1:3]
    with torch.autocast(patches.device.type, enabled=False):
        if rows != grid[0]:
            patches = torch.einsum("ah,nhwc->nawc", _overlap(rows, grid[0], patches), patches)
        if columns != grid[1]:
            patches = torch.einsum("bw,nhwc->nhbc", _overlap(columns, grid[1], patches), patches)
    return patches


def _overlap(fine: int, coarse: int, like: Tensor) -> Tensor:
    """Return how much of each of `coarse` cells each of `fine` cells of the same length fills (coarse, fine)."""
    edges = torch.arange(fine, dtype=like.dtype, device=like.device)
    lows = torch.arange(coarse, dtype=like.dtype, device=like.device)[:, None] * (fine / coarse)
    shared = torch.minimum(edges + 1, lows + fine / coarse) - torch.maximum(edges, lows)
    return shared.clamp(min=0) * (coarse / fine)
