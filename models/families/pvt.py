"""PVTv2 (arXiv:2106.13797) and PVT (arXiv:2102.12122): stages of blocks with spatially reduced keys and values."""

from __future__ import annotations

from typing import Any

from timm.models.pvt_v2 import Attention, Block, PyramidVisionTransformerV2
from torch import nn

from ..attention.base import Geometry
from ..pvt_layers import PVTBlock
from ..pvt_v1 import PVT
from .model_types import vit
from .site import Family, merged_grid


class PVTv2(Family):
    """timm's `pvt_v2_*`. They take images of any size, so their constructor has no size."""

    name = "pvt_v2 (PVTv2)"
    models: tuple[type[nn.Module], ...] = (PyramidVisionTransformerV2,)
    blocks: tuple[type[nn.Module], ...] = (Block,)
    attentions = (Attention,)
    sized_when_built = False
    takes_size = False

    def paths(self, model: nn.Module) -> list[list[str]]:
        stages: Any = model.stages
        return [
            [f"stages.{i}.blocks.{j}" for j in range(len(stage.blocks))] for i, stage in enumerate(stages)
        ]

    def merges(self, model: nn.Module) -> list[str]:
        stages: Any = model.stages
        return [f"stages.{i}.downsample" for i in range(1, len(stages))]

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
            grid = merged_grid(embedding, grid)
            found.append(Geometry(0, grid))
        return found

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        whole: Any = model
        whole.img_size = size


class PVTv1(PVTv2):
    """Our `pvt_*`: positions are learned for one size of the images, and the last stage has a class token."""

    name = "pvt (PVT)"
    models = (PVT,)
    blocks = (PVTBlock,)
    sized_when_built = True

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        size = vit(model).patch_embed.img_size
        return int(size[0]), int(size[1])

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        whole: Any = model
        found = super().geometries(model, size)
        return [
            Geometry(stage.num_prefix, each.grid) for stage, each in zip(whole.stages, found, strict=True)
        ]

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        vit(model).set_input_size(img_size=size)
