"""MoCo-v3, whose small ViT has twice the usual heads: no tensor's shape says so, but its fixed positions do."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...models.errors import Json
from ..position import find_grid
from ..weights import Weights
from .normalization import IMAGENET, NOTE, normalized

PROJECTION = "the projection head of MoCo"
SMALL_WIDTH = 384
SMALL_HEADS = 12


def describe_moco(weights: Weights, config: Json) -> Weights:
    """ImageNet's statistics, and the 12 heads of the small model."""
    return _with_heads(normalized(weights, IMAGENET, "ImageNet's, as MoCo-v3 trains"))


def describe_plain(weights: Weights, config: Json) -> Weights:
    """Return a plain ViT: what the file says of it; without a head, and without a word, ImageNet's statistics."""
    if _has_moco_positions(weights.tensors["pos_embed"]):
        return describe_moco(weights, config)
    if "head.weight" in weights.tensors or any(note.startswith(NOTE) for note in weights.notes):
        return weights
    reason = "ImageNet's assumed, for plain ViTs without a head are self-supervised ones (DINO, iBOT, MAE)"
    return normalized(weights, IMAGENET, reason)


def _with_heads(weights: Weights) -> Weights:
    if weights.tensors["cls_token"].shape[-1:] != (SMALL_WIDTH,):
        return weights
    note = f"heads: {SMALL_HEADS}, as MoCo-v3's small ViT has"
    return replace(
        weights,
        model_args={"num_heads": SMALL_HEADS, **weights.model_args},
        notes=(*weights.notes, note),
    )


def _has_moco_positions(position_1ND: Tensor) -> bool:
    """Return whether these are MoCo-v3's sines and cosines: its first half follows the rows; MAE's follows the
    columns."""
    grid = find_grid(position_1ND.shape[1] - 1, None) if position_1ND.ndim == 3 else None
    if grid is None or grid[0] < 2 or position_1ND.shape[2] % 4:
        return False
    quarter = position_1ND.shape[2] // 4
    frequency_Q = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    row_N = torch.arange(grid[0]).repeat_interleave(grid[1])
    angle_NQ = row_N[:, None] * frequency_Q
    expected_NC = torch.cat([angle_NQ.sin(), angle_NQ.cos()], dim=1)
    return torch.allclose(position_1ND[0, 1:, : 2 * quarter].float(), expected_NC, atol=1e-3)
