"""Tiny models and images for the tests of what looks inside models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from graftvit.models.attention.base import AttentionOperator, Heads
from graftvit.models.calibration import fit_at_random
from graftvit.models.conversion import convert, converted_layers
from graftvit.transfer.analysis.layer_maps import MergePlaces
from PIL import Image
from support.models.tiny_students import save_folder
from torch import Tensor, nn

ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS = {
    "img_size": (16, 24), "patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 2, "num_classes": 3,
    "reg_tokens": 2,
}  # fmt: skip
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
GRID, PREFIX, TOKENS = (4, 6), 3, 27


def tiny(plan: str | None = None, seed: int = 0, **more: Any) -> nn.Module:
    """A model of a 4 x 6 grid behind a class token and two registers, whose maps are far from even."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(ARCHITECTURE, **{**ARGUMENTS, **more})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if plan is not None:
        model = convert(model, plan)
        fit_at_random(converted_layers(model))
    return model.eval()


def save(model: nn.Module, folder: Path, **more: Any) -> str:
    """A folder that loads it; its name as a source."""
    shown = {"mean": MEAN, "std": STD, "crop_pct": 1.0}
    return f"local-dir:{save_folder(model, folder, ARCHITECTURE, {**ARGUMENTS, **more}, shown)}"


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (24, 16)) -> str:
    """An image file of random pixels, (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@torch.no_grad()
def operator_inputs(model: nn.Module, image: Tensor, layer: int) -> tuple[AttentionOperator, Heads]:
    """The operator of a converted layer and what it is given for an image."""
    taken: list[Heads] = []
    operator: Any = converted_layers(model)[layer].operator
    hook = operator.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    model(image)
    hook.remove()
    return operator, taken[0]


def chain(seed: int, sides: tuple[int, int], count: int) -> list[MergePlaces]:
    """Merges one after the other, with random shifts of up to three tokens."""
    drawn, found, grid = torch.Generator().manual_seed(seed), [], sides
    for stage in range(count):
        merged = grid[0] // 2, grid[1] // 2
        starts = torch.stack(torch.meshgrid(*(2.0 * torch.arange(n) for n in merged), indexing="ij"), -1)
        taps = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        shifts = 6 * torch.rand(*merged, 4, 2, generator=drawn) - 3
        token = 2**stage / sides[0], 2**stage / sides[1]
        found.append(MergePlaces(stage, grid, token, sides, starts[:, :, None] + taps + shifts))
        grid = merged
    return found
