"""Swin and Swin V2: windows of the grid, shifted in every other block (arXiv:2103.14030, arXiv:2111.09883)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer import WindowAttention as WindowAttentionV1
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import nn

from ..attention.base import Geometry
from ..token_merging import SwinMerging, TokenMerging
from .plain import patch_grid
from .site import Family, listed, merged_grid, shallow, submodule, vit


class Swin(Family):
    """timm's `swin_*` and `swinv2_*` of these two classes."""

    name = "swin_transformer and swin_transformer_v2 (Swin, Swin V2)"
    models = (SwinTransformer, SwinTransformerV2)
    blocks = (SwinTransformerBlock, SwinTransformerV2Block)
    attentions = (WindowAttentionV1, WindowAttentionV2)
    merging = SwinMerging
    relative_bias = True

    def paths(self, model: nn.Module) -> list[list[str]]:
        layers: Any = model.layers
        return [
            [f"layers.{i}.blocks.{j}" for j in range(len(layer.blocks))] for i, layer in enumerate(layers)
        ]

    def merges(self, model: nn.Module) -> list[str]:
        layers: Any = model.layers
        return [f"layers.{i}.downsample" for i in range(1, len(layers))]

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        size = vit(model).patch_embed.img_size
        return None if size is None else (int(size[0]), int(size[1]))

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        layers: Any = model.layers
        found, (height, width) = [], patch_grid(vit(model).patch_embed, size)
        for layer in layers:
            if isinstance(layer.downsample, TokenMerging):
                height, width = merged_grid(layer.downsample, (height, width))
            elif not isinstance(layer.downsample, nn.Identity):
                height, width = -(-height // 2), -(-width // 2)  # timm pads an odd side
            found.append(Geometry(0, (height, width)))
        return found

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        """Resize with the same windows; a stage after deformable merging may have fewer tokens than timm expects.

        timm's `set_input_size` alone would scale the windows, and its constructor does not.
        """
        whole: Any = model
        whole.set_input_size(img_size=size, window_size=_windows(whole))
        for layer, geometry in zip(whole.layers, self.geometries(model, size), strict=True):
            expected, layer.output_resolution = tuple(layer.output_resolution), geometry.grid
            for block in layer.blocks if expected != geometry.grid else ():
                block.set_input_size(feat_size=geometry.grid, window_size=block.window_size)

    def size_arguments(self, model: nn.Module) -> dict[str, Any]:
        windows = _windows(model)
        if isinstance(windows, int) or isinstance(windows[0], int):
            return {}  # as its constructor was told
        return {"img_size": self.image_size(model), "window_size": windows}

    def with_blocks(self, model: nn.Module, blocks: Sequence[nn.Module], *, cut: bool) -> nn.Module:
        layers = submodule(model, "layers")
        twins = []
        for own, layer in zip(self.by_stage(model, blocks), layers.children(), strict=False):
            twin = shallow(layer)
            twin._modules["blocks"] = listed(submodule(layer, "blocks"), own)
            twins.append(twin)
        whole = shallow(model)
        whole._modules["layers"] = listed(layers, twins)
        return whole

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return list(submodule(model, "layers").children())


def _windows(model: Any) -> Any:
    """Return the windows of the stages: a number as timm's constructor got it, or the sides for each stage."""
    return getattr(model, "_model_args", {}).get("window_size", model._ref_window_sizes)
