"""MetaFormer: one block for every token mixer; CAFormer has attention in its later stages (arXiv:2210.13452)."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.models.metaformer import Attention, MetaFormerBlock, Scale, StarReLU
from timm.models.metaformer import MetaFormer as MetaFormerModel
from torch import Tensor, nn

from ..attention.base import Geometry, Heads
from ..host import GridHost
from ..map_structure import Size
from .site import OWN_PLACES, AnySize, Hosts, convolved, submodule

OWN_PLACES[MetaFormerBlock] = "token_mixer"


class SequenceHost(GridHost):
    """Softmax over all tokens of a stage, (B, N, C); only a converted layer is told their grid, batch by batch."""

    gets_grid = False
    reduction = ()

    def project(self, x: Tensor, size: Size | None = None) -> Heads:  # type: ignore[override]
        heads = super().project(x, (1, x.shape[1]))
        heads.geometry = self.geometry
        return heads


class MetaFormer(AnySize):
    """timm's `caformer_*`. Blocks with another token mixer are no sites, and stay as they are."""

    name = "metaformer (CAFormer)"
    models = (MetaFormerModel,)
    blocks = (MetaFormerBlock,)
    hosts: ClassVar[Hosts] = {Attention: SequenceHost}

    def paths(self, model: Any) -> list[list[str]]:
        """Return the names of the blocks with attention; a stage of images (B, C, H, W) has none."""
        every = super().paths(model)
        return [[] if stage.use_nchw else names for stage, names in zip(model.stages, every, strict=True)]

    def takes(self, model: nn.Module) -> bool:
        """Return whether a block has attention: where all mix tokens otherwise, outputs alone are read."""
        return super().takes(model) and any(self.paths(model))

    def channels(self, model: nn.Module) -> int:
        embedding: Any = self.embedding(model)
        return int(embedding.conv.in_channels)

    def geometries(self, model: Any, size: tuple[int, int]) -> list[Geometry]:
        found, grid = [], convolved(model.stem.conv, size)
        for stage in model.stages:
            convolution = stage.downsample._modules.get("conv")
            grid = grid if convolution is None else convolved(convolution, grid)
            found.append(Geometry(0, grid))
        return found

    def embedding(self, model: nn.Module) -> nn.Module:
        return submodule(model, "stem")

    def takes_any_grid(self, model: nn.Module) -> bool:
        return True

    def shows_grid(self, model: nn.Module, stage: int) -> nn.Module:
        return submodule(model, f"stages.{stage}.downsample")

    def grid_of(self, model: nn.Module, images: Any, patches: Any) -> tuple[int, int]:
        return patches.shape[2], patches.shape[3]

    def initialize(self, model: nn.Module) -> None:
        """Initialize every weight as the constructor does, but a layer scale, which does not keep its first value."""
        super().initialize(model)
        for name, module in model.named_modules():
            if isinstance(module, StarReLU):
                nn.init.ones_(module.scale)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Scale) and ".res_scale" in name:
                nn.init.ones_(module.scale)


FAMILIES = (MetaFormer(),)
