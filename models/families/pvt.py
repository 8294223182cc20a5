"""PVTv2 (arXiv:2106.13797) and PVT (arXiv:2102.12122): stages of blocks with spatially reduced keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from timm.models.pvt_v2 import Attention, Block, PyramidVisionTransformerV2
from timm.models.pvt_v2 import MlpWithDepthwiseConv as MlpWithDepthwiseConv
from torch import Tensor, nn

from ..attention.base import Geometry
from ..host import ReducedHost
from .pvt_v1 import PVT, PVTBlock
from .site import AnySize, Family, Hosts, merged_grid, size_of, submodule, vit


class PVTv2(AnySize):
    """timm's `pvt_v2_*`. They take images of any size, so their constructor has no size."""

    name = "pvt_v2 (PVTv2)"
    models: tuple[type[nn.Module], ...] = (PyramidVisionTransformerV2,)
    blocks: tuple[type[nn.Module], ...] = (Block,)
    hosts: ClassVar[Hosts] = {Attention: ReducedHost}

    def merges(self, model: nn.Module) -> list[str]:
        stages: Any = model.stages
        return [f"stages.{i}.downsample" for i in range(1, len(stages))]

    def known_size(self, model: Any) -> tuple[int, int] | None:
        return size_of(model.patch_embed) or size_of(model)

    def geometries(self, model: Any, size: tuple[int, int]) -> list[Geometry]:
        embeddings = [stage.downsample or model.patch_embed for stage in model.stages]
        found, grid = [], size
        for embedding in embeddings:
            grid = merged_grid(embedding, grid)
            found.append(Geometry(0, grid))
        return found

    def with_blocks(self, model: nn.Module, blocks: Sequence[nn.Module], *, cut: bool) -> nn.Module:
        twin: Any = super().with_blocks(model, blocks, cut=cut)
        last = list(twin.stages)[-1]
        if cut and "norm" in last._modules:
            last._modules["norm"] = nn.Identity()
        return twin


class PVTv1(PVTv2):
    """Our `pvt_*`: positions are learned for one size of the images, and the last stage has a class token."""

    name = "pvt (PVT)"
    models = (PVT,)
    blocks = (PVTBlock,)
    sized_when_built = True

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        size = vit(model).patch_embed.img_size
        return int(size[0]), int(size[1])

    def patch_size(self, model: nn.Module) -> tuple[int, int]:
        return Family.patch_size(self, model)

    def geometries(self, model: Any, size: tuple[int, int]) -> list[Geometry]:
        found = super().geometries(model, size)
        return [
            Geometry(stage.num_prefix, each.grid) for stage, each in zip(model.stages, found, strict=True)
        ]

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        vit(model).set_input_size(img_size=size)

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return submodule(model, "norm")

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return Family.patches(self, tokens, geometry)


FAMILIES = (PVTv2(), PVTv1())
