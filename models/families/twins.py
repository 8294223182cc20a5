"""Twins: PVT's reduced attention (PCPVT), or windows and reduced attention in turn (SVT) (arXiv:2104.13840)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from timm.models.twins import Block, GlobalSubSampleAttn, LocallyGroupedAttn
from timm.models.twins import Twins as TwinsModel
from torch import Tensor, nn

from ..attention.base import Geometry
from ..host import ReducedHost, WindowHost
from ..token_merging import TokenMerging
from .site import Family, Hosts, shallow, size_of, submodule


class TwinsMerging(TokenMerging):
    """The same for Twins: (B, C, H, W) to the tokens (B, h·w, C') and their grid (h, w)."""

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:  # type: ignore[override]
        out = super().forward(x_BCHW)
        return out.flatten(1, 2), (out.shape[1], out.shape[2])


class Twins(Family):
    """timm's `twins_pcpvt_*` and `twins_svt_*`."""

    name = "twins (Twins-PCPVT, Twins-SVT)"
    models = (TwinsModel,)
    blocks = (Block,)
    hosts: ClassVar[Hosts] = {GlobalSubSampleAttn: ReducedHost, LocallyGroupedAttn: WindowHost}
    sized_when_built = False
    merging = TwinsMerging

    def paths(self, model: nn.Module) -> list[list[str]]:
        stages: Any = model.blocks
        return [[f"blocks.{i}.{j}" for j in range(len(stage))] for i, stage in enumerate(stages)]

    def merges(self, model: Any) -> list[str]:
        return [f"patch_embeds.{i}" for i in range(1, len(model.patch_embeds))]

    def image_size(self, model: Any) -> tuple[int, int] | None:
        height, width = getattr(model, "img_size", None) or model.patch_embeds[0].img_size
        return int(height), int(width)

    def known_size(self, model: nn.Module) -> tuple[int, int] | None:
        return size_of(model)

    def channels(self, model: Any) -> int:
        return int(model.patch_embeds[0].proj.in_channels)

    def geometries(self, model: Any, size: tuple[int, int]) -> list[Geometry]:
        found, (height, width) = [], size
        for embedding in model.patch_embeds:
            height, width = height // embedding.patch_size[0], width // embedding.patch_size[1]
            found.append(Geometry(0, (height, width)))
        return found

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        model.img_size = size

    def with_blocks(self, model: nn.Module, blocks: Sequence[nn.Module], *, cut: bool) -> nn.Module:
        stages = self.by_stage(model, blocks)
        twin = shallow(model)
        twin._modules["blocks"] = nn.ModuleList(nn.ModuleList(stage) for stage in stages)
        if cut and len(stages[-1]) == 1:  # timm runs this convolution after the first block of a stage
            convolutions = list(submodule(model, "pos_block").children())
            convolutions[len(stages) - 1] = _Unchanged()
            twin._modules["pos_block"] = nn.ModuleList(convolutions)
        return twin

    def embedding(self, model: nn.Module) -> nn.Module:
        return submodule(model, "patch_embeds.0")

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return []  # timm has no gradient checkpointing for them


class _Unchanged(nn.Module):
    """Return the tokens, whatever else is given."""

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return x


FAMILIES = (Twins(),)
