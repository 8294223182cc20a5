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
from .site import Family, Hosts, listed, merged_grid, shallow, size_of, submodule, vit


class PVTv2(Family):
    """timm's `pvt_v2_*`. They take images of any size, so their constructor has no size."""

    name = "pvt_v2 (PVTv2)"
    models: tuple[type[nn.Module], ...] = (PyramidVisionTransformerV2,)
    blocks: tuple[type[nn.Module], ...] = (Block,)
    hosts: ClassVar[Hosts] = {Attention: ReducedHost}
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

    def known_size(self, model: nn.Module) -> tuple[int, int] | None:
        own: Any = model
        return size_of(own.patch_embed) or size_of(own)

    def patch_size(self, model: nn.Module) -> tuple[int, int]:
        return 1, 1

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

    def with_blocks(self, model: nn.Module, blocks: Sequence[nn.Module], *, cut: bool) -> nn.Module:
        stages = submodule(model, "stages")
        twins = []
        for own, stage in zip(self.by_stage(model, blocks), stages.children(), strict=False):
            twin = shallow(stage)
            twin._modules["blocks"] = listed(submodule(stage, "blocks"), own)
            twins.append(twin)
        if cut and "norm" in twins[-1]._modules:
            twins[-1]._modules["norm"] = nn.Identity()
        whole = shallow(model)
        whole._modules["stages"] = listed(stages, twins)
        return whole

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return list(submodule(model, "stages").children())[-1]

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens.permute(0, 2, 3, 1)

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return list(submodule(model, "stages").children())


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

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        whole: Any = model
        found = super().geometries(model, size)
        return [
            Geometry(stage.num_prefix, each.grid) for stage, each in zip(whole.stages, found, strict=True)
        ]

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        vit(model).set_input_size(img_size=size)

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return submodule(model, "norm")

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return Family.patches(self, tokens, geometry)


FAMILIES = (PVTv2(), PVTv1())
