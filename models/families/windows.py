"""Stages of windows that are not Swin's: DaViT (arXiv:2204.03645)."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.models.davit import DaVit, SpatialBlock
from timm.models.davit import WindowAttention as DavitAttention
from torch import Tensor, nn

from ..attention.base import Geometry
from ..host import WindowHost
from ..map_structure import Size, Windows
from .site import AnySize, Blocks, Hosts, submodule


class BlockWindowHost(WindowHost):
    """A layer whose block says how large windows are."""

    def windows(self, grid: Size) -> Windows:
        block: Any = self._block[0]
        return Windows(grid, tuple(block.window_size))


# DaViT: windows, then attention of channels, in turn.


class WholeSpatialBlock(SpatialBlock):
    """timm's block of DaViT whose attention gets the whole grid (B, height, width, C) instead of windows."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = self.cpe1(x_BCHW).permute(0, 2, 3, 1)
        x_BHWC = x_BHWC + self.drop_path1(self.attn(self.norm1(x_BHWC)))
        x_BCHW = self.cpe2(x_BHWC.permute(0, 3, 1, 2))
        if not self.ffn:
            return x_BCHW
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        x_BHWC = x_BHWC + self.drop_path2(self.mlp(self.norm2(x_BHWC)))
        out_BCHW: Tensor = x_BHWC.permute(0, 3, 1, 2)
        return out_BCHW


class Davit(AnySize):
    """timm's `davit_*`: sites are the blocks of windows. Attention of channels has no map of tokens, and stays."""

    name = "davit (DaViT)"
    models = (DaVit,)
    blocks = (SpatialBlock,)
    hosts: ClassVar[Hosts] = {DavitAttention: BlockWindowHost}
    whole: ClassVar[Blocks] = {SpatialBlock: WholeSpatialBlock}

    def paths(self, model: nn.Module) -> list[list[str]]:
        whole: Any = model
        return [
            [
                name
                for name, part in stage.named_modules(prefix=f"stages.{i}")
                if isinstance(part, SpatialBlock)
            ]
            for i, stage in enumerate(whole.stages)
        ]

    def channels(self, model: nn.Module) -> int:
        whole: Any = model
        return int(whole.stem.in_chs)

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        whole: Any = model
        found, grid = [], (-(-size[0] // 4), -(-size[1] // 4))
        for stage in whole.stages:
            if not isinstance(stage.downsample, nn.Identity):
                height, width = grid
                grid = -(-height // 2), -(-width // 2)
            found.append(Geometry(0, grid))
        return found

    def attention_input(self, block: nn.Module) -> None:
        return None  # a convolution of the grid comes first

    def in_sequence(self, out: Tensor) -> Tensor:
        return out.flatten(2).transpose(1, 2)

    def embedding(self, model: nn.Module) -> nn.Module:
        return submodule(model, "stem")

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return submodule(model, "norm_pre")


FAMILIES = (Davit(),)
