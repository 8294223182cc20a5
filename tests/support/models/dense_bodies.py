"""Tiny backbones for dense models, and images of several sizes with targets."""

from __future__ import annotations

from typing import Any

import torch
from graftvit.models import cswin_models, lit, pvt_models
from graftvit.models.conversion import convert
from graftvit.models.families import create_timm_model
from torch import Tensor, nn

REGISTERED = (cswin_models, lit, pvt_models)
STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1)}
WIDE = {**STAGES, "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}
VIT: dict[str, Any] = {"dynamic_img_size": True, "depth": 2, "embed_dim": 48, "num_heads": 3}
SWIN = {**STAGES, "strict_img_size": False, "embed_dim": 24}
BODIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "pvt": ("pvt_tiny", WIDE, ""),
    "pvt_v2": ("pvt_v2_b0", WIDE, ""),
    "twins": ("twins_svt_small", {**WIDE, "wss": (7, 7, 7, 7)}, ""),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, ""),
    "lit_ti": ("lit_ti", WIDE, ""),
    "lit_s": ("lit_s", SWIN, ""),
    "litv2": ("litv2_s", SWIN, ""),
    "cswin": ("cswin_tiny", {**STAGES, "embed_dim": 16, "num_heads": (2, 2, 4, 4)}, ""),
    "vit": ("vit_tiny_patch16_224", VIT, ""),
    "linear_vit": ("vit_tiny_patch16_224", VIT, "*: linear"),
    "linear_swin": ("swin_tiny_patch4_window7_224", SWIN, "stage3: linear"),
    "linear_pvt": ("pvt_tiny", WIDE, "stage1-2: linear"),
}
"""timm's name, its arguments, and a layer plan."""
SIZES = ((90, 150), (64, 100))


def body(name: str) -> nn.Module:
    """Return a tiny model for images of any size."""
    architecture, arguments, plan = BODIES[name]
    made = create_timm_model(architecture, num_classes=5, **arguments)
    return convert(made, plan, without=("bias",) if "swin" in name else ()) if plan else made


def images() -> list[Tensor]:
    """Return two images of different sizes, values 0..1."""
    return [torch.rand(3, *size) for size in SIZES]


def targets(task: str, num_classes: int = 3) -> list[dict[str, Any]]:
    """Return a target for each of `images`; the second one of detection has no object."""
    if task == "segmentation":
        found = [torch.randint(0, num_classes, size) for size in SIZES]
        found[0][:7] = 255
        return [{"labels": each} for each in found]
    boxes = torch.tensor([[10.0, 10, 60, 60], [0, 0, 30, 20]])
    masks = torch.zeros(2, *SIZES[0], dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    nothing = torch.zeros(0, *SIZES[1], dtype=torch.bool)
    return [
        {"boxes": boxes, "labels": torch.tensor([1, 0]), "masks": masks},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": nothing},
    ]
