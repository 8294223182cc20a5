"""VOLO: outlook attention, then stages of plain blocks, and class attention (arXiv:2106.13112)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from timm.layers import resample_abs_pos_embed_nhwc, trunc_normal_
from timm.models.volo import VOLO, Attention, Downsample, Outlooker, Transformer
from torch import nn

from ..attention.base import Geometry
from ..host import GridHost
from .site import Family, Hosts, convolved, merged_grid, named_heads, submodule


class Volo(Family):
    """timm's `volo_*`. Outlook attention has no keys, and class attention one query: these blocks stay as they are."""

    name = "volo (VOLO)"
    models = (VOLO,)
    blocks = (Transformer,)
    hosts: ClassVar[Hosts] = {Attention: GridHost}
    resized_when_loaded = True
    rerun = ("network",)

    def paths(self, model: nn.Module) -> list[list[str]]:
        """Return the names of the blocks of each stage; a stage of outlook attention has none."""
        return [
            [
                f"network.{i}.{place}"
                for place, block in stage.named_children()
                if not isinstance(block, Outlooker)
            ]
            for i, stage in submodule(model, "network").named_children()
            if not isinstance(stage, Downsample)
        ]

    def classifiers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the head of the pooled features; `aux_head` reads the patches, and timm adds it to the logits."""
        return named_heads(model)

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        rows, columns = self.position_grid(model)
        step = _step(model)
        return rows * step, columns * step

    known_size = fixed_size = image_size

    def position_grid(self, model: nn.Module) -> tuple[int, int]:
        _, rows, columns, _ = model.get_parameter("pos_embed").shape
        return rows, columns

    def is_strict(self, model: nn.Module) -> bool:
        return True

    def channels(self, model: Any) -> int:
        return int(model.in_chans)

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        embedding: Any = self.embedding(model)
        found, grid = [], merged_grid(embedding, convolved(embedding.conv[0], size))
        for part in submodule(model, "network").children():
            if isinstance(part, Downsample):
                grid = merged_grid(part, grid)
            else:
                found.append(Geometry(0, grid))
        return found

    def last_geometry(self, model: nn.Module, size: tuple[int, int]) -> Geometry:
        """Return the last grid with the class token, which joins after the blocks."""
        grid = super().last_geometry(model, size).grid
        return Geometry(0 if model._modules.get("post_network") is None else 1, grid)

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        """Resample the positions.

        Raises ValueError: the sides are no multiples of what becomes one token.
        """
        step = _step(model)
        if any(side % step for side in size):
            raise ValueError(f"the sides of its images are multiples of {step}")
        old = model.pos_embed
        new = resample_abs_pos_embed_nhwc(old.detach(), [side // step for side in size])
        model.pos_embed = nn.Parameter(new.clone(), requires_grad=old.requires_grad)

    def initialize(self, model: nn.Module) -> None:
        super().initialize(model)
        for tokens in model.parameters(recurse=False):
            trunc_normal_(tokens, std=0.02)

    def with_blocks(self, model: nn.Module, blocks: Sequence[nn.Module], *, cut: bool) -> nn.Module:
        twin = super().with_blocks(model, blocks, cut=cut)
        if cut:
            twin._modules["post_network"], twin._modules["norm"] = None, nn.Identity()
        return twin


def _step(model: Any) -> int:
    """Return the height and width of the images' part that becomes one token with a position."""
    width, embedding = int(model.pooling_scale), model.patch_embed
    return width * int(embedding.conv[0].stride[0]) * int(embedding.proj.stride[0])


FAMILIES = (Volo(),)
