"""PVTv2: four stages of blocks with spatially reduced keys and values (arXiv:2106.13797)."""

from __future__ import annotations

from typing import Any

from timm.models.pvt_v2 import Attention, Block, PyramidVisionTransformerV2
from torch import nn

from ..attention.base import Geometry
from .site import Family


class PVTv2(Family):
    """timm's `pvt_v2_*`. They take images of any size, so their constructor has no size."""

    name = "pvt_v2 (PVTv2)"
    models = (PyramidVisionTransformerV2,)
    blocks = (Block,)
    attentions = (Attention,)
    sized_when_built = False
    takes_size = False

    def paths(self, model: nn.Module) -> list[list[str]]:
        stages: Any = model.stages
        return [
            [f"stages.{i}.blocks.{j}" for j in range(len(stage.blocks))] for i, stage in enumerate(stages)
        ]

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Return the size that the model was resized to, else the size of its published weights."""
        own: Any = getattr(model, "img_size", None)
        described: Any = getattr(model, "default_cfg", None) or {}
        height, width = own or tuple(described.get("input_size", ())[1:]) or (224, 224)
        return int(height), int(width)

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        whole: Any = model
        embeddings = [stage.downsample or whole.patch_embed for stage in whole.stages]
        found, grid = [], size
        for embedding in embeddings:
            grid = _after(embedding.proj, grid)
            found.append(Geometry(0, grid))
        return found

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        whole: Any = model
        whole.img_size = size


def _after(convolution: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of a convolution's output."""
    sides: Any = zip(
        size, convolution.kernel_size, convolution.stride, convolution.padding, strict=True
    )  # fmt: skip
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides)
    return height, width
