"""Tiny models and files for the tests of this package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 4}


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """A 16x16 ViT of width 16 with two blocks and random weights everywhere, norms and biases too."""

    def make(**arguments: Any) -> nn.Module:
        model: nn.Module = timm.create_model(
            "vit_tiny_patch16_224", **{**TINY, "num_classes": 0, **arguments}
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-1, 1)
        return model

    return make


@pytest.fixture
def mae_file(tmp_path: Path) -> Callable[[dict[str, Tensor]], str]:
    """Writes a state dict as MAE publishes its weights."""

    def write(tensors: dict[str, Tensor], name: str = "mae.pth", **more: Any) -> str:
        torch.save({"model": tensors, **more}, tmp_path / name)
        return str(tmp_path / name)

    return write
