"""Swin and Swin V2: windows of the grid, shifted in every other block (arXiv:2103.14030, arXiv:2111.09883)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer import WindowAttention as WindowAttentionV1
from timm.models.swin_transformer_v2 import PatchMerging, SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.swin_transformer_v2_cr import (
    SwinTransformerV2Cr,
    SwinTransformerV2CrBlock,
    WindowMultiHeadAttention,
)
from torch import Tensor, nn

from ..attention.base import Geometry
from ..host import WindowHost, wrong_bias
from ..map_structure import Size, Windows, offsets, resample_table
from ..token_merging import TokenMerging
from .plain import patch_grid
from .site import Blocks, Family, Hosts, merged_grid, submodule, vit

LARGEST_LOG_SCALE = math.log(1.0 / 0.01)
"""The limit of the logarithm of Swin V2's learned scale."""


class SwinHost(WindowHost):
    """Swin: natively, softmax within windows of the shifted grid, with a relative position bias.

    Converted, the bias is of the whole grid. On another grid than its own the table of relative positions is resampled
    (plain bicubic, as LIT's detectors do).
    """

    _resampled: tuple[Tensor, tuple[Any, ...], Tensor] | None = None
    """The table and what it was, and the table resampled for the latest other grid."""

    def windows(self, grid: Size) -> Windows:
        return Windows(grid, tuple(self._block[0].window_size), tuple(self._block[0].shift_size))

    @property
    def window_size(self) -> Size:
        """The grid of the bias: code that resamples tables by timm's names reads it here."""
        height, width = self.original.window_size
        return height, width

    def set_input_size(
        self, feat_size: Size, window_size: Size, always_partition: bool | None = None
    ) -> None:
        """Change the grid as timm does; a converted layer has no windows, and a bias for the whole grid."""
        if self.is_native:
            super().set_input_size(feat_size, window_size, always_partition)
        elif self.has_bias:
            self.fit_bias(feat_size)

    def fit_bias(self, grid: Size) -> None:
        self.original.set_window_size(tuple(grid))

    def grid_bias(self, grid: Size, q_BHND: Tensor | None) -> Tensor | None:
        if not self.has_bias:
            return None
        return self.relative_bias() if self.window_size == tuple(grid) else self.bias_on(grid)

    def bias_on(self, grid: Size) -> Tensor:
        """Return the bias of another grid than the layer's own, (1, H, N, N)."""
        table_RWH = self._table_on(grid)
        places = (torch.arange(side, device=table_RWH.device) for side in grid)
        rows, columns = (at[:, None] - at + len(at) - 1 for at in places)
        bias = table_RWH[rows[:, None, :, None], columns[None, :, None, :]]
        return bias.flatten(2, 3).flatten(0, 1).permute(2, 0, 1).unsqueeze(0)

    def _table_on(self, grid: Size) -> Tensor:
        """Return the table for another grid, (2 h - 1, 2 w - 1, H), kept while no gradient is needed."""
        table = self.get_parameter("relative_position_bias_table")
        old, new = offsets(self.window_size), offsets(grid)
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and table.requires_grad):
            return resample_table(table, old, new).unflatten(0, new)
        now = (table._version, table.dtype, table.device, old, new)
        if self._resampled is None or self._resampled[0] is not table or self._resampled[1] != now:
            self._resampled = (table, now, resample_table(table.detach(), old, new).unflatten(0, new))
        return self._resampled[2]

    def window_bias(self, windows: Windows, like: Tensor) -> Tensor:
        bias = self.relative_bias()
        mask = self._shift_mask(windows, like)
        return bias.to(like.dtype) if mask is None else (bias + mask.unsqueeze(1)).to(like.dtype)

    def relative_bias(self) -> Tensor:
        """Return the bias of all pairs of tokens of the window that the layer is set to, (1, H, M, M)."""
        return self.original._get_rel_pos_bias()

    def _shift_mask(self, windows: Windows, like: Tensor) -> Tensor | None:
        """Return -100 between tokens of a window that are no neighbors in the grid, (W, M, M); None without a shift."""
        block: Any = self._block[0]
        if block.dynamic_mask:
            return block.get_attn_mask(like.new_empty(1, *windows.padded, 1))
        return block.attn_mask


class SwinV2Host(SwinHost):
    """Swin V2: cosine attention with a learned scale, and a bias computed from the distance of two tokens."""

    has_cosine_logits = True

    def normed(self, part: str, x_BHND: Tensor | None) -> Tensor | None:
        if x_BHND is None:
            return None
        x_BHND = F.normalize(x_BHND, dim=-1)
        if part == "k":
            return x_BHND
        scale: Any = self.logit_scale
        return x_BHND * torch.clamp(scale, max=LARGEST_LOG_SCALE).exp().view(-1, 1, 1)

    def bias_on(self, grid: Size) -> Tensor:
        """Raise UnsupportedModelError: the bias is computed from the distances of the layer's own grid."""
        raise wrong_bias(self.window_size, grid)

    def relative_bias(self) -> Tensor:
        layer: Any = self.original
        tokens = layer.window_size[0] * layer.window_size[1]
        table = layer.cpb_mlp(layer.relative_coords_table).view(-1, self.num_heads)
        bias = table[layer.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        return 16 * torch.sigmoid(bias).unsqueeze(0)

    def _separate_biases(self) -> list[Tensor]:
        biases = [getattr(self, f"{part}_bias", None) for part in self.kept]  # parameters, and a buffer for k
        return [bias for bias in biases if bias is not None]

    def _project(self, x_BNC: Tensor) -> Tensor:
        biases = self._separate_biases()
        if not biases:
            return self._child("qkv", x_BNC)
        fused: Any = self.qkv
        bias = torch.cat(biases)
        if self.separate_bias:
            return F.linear(x_BNC, fused.weight) + bias
        return F.linear(x_BNC, fused.weight, bias)


class SwinCrHost(SwinV2Host):
    """The same, with a bias computed by a network that has dropout."""

    def relative_bias(self) -> Tensor:
        return self.original._relative_positional_encodings()


class _WholeGrid:
    """The two methods of timm's blocks of Swin that know of windows."""

    attn: Any
    input_resolution: Size

    def _attn(self, x: Tensor) -> Any:
        return self.attn(x)

    def set_input_size(
        self,
        feat_size: Size,
        window_size: Size,
        always_partition: bool | None = None,
    ) -> None:
        """Change the grid; the layer decides what this means for its windows."""
        self.input_resolution = feat_size
        self.attn.set_input_size(feat_size, window_size, always_partition)


class WholeGridBlock(_WholeGrid, SwinTransformerBlock):  # type: ignore[misc]
    """timm's block of Swin whose attention gets the whole grid (B, height, width, C) instead of windows."""


class WholeGridBlockV2(_WholeGrid, SwinTransformerV2Block):
    """timm's block of Swin V2 whose attention gets the whole grid (B, height, width, C) instead of windows."""


class WholeGridBlockCr(_WholeGrid, SwinTransformerV2CrBlock):
    """timm's other block of Swin V2 whose attention gets the whole grid (B, height, width, C) instead of windows."""

    _shifted_window_attn = _WholeGrid._attn

    def set_input_size(self, feat_size: Size, *more: Any, **options: Any) -> None:
        """Change the grid."""
        super().set_input_size(feat_size, *more, **options)
        self.feat_size = feat_size


class SwinMerging(TokenMerging, PatchMerging):
    """The same for Swin: (B, H, W, C) to (B, h, w, C'). timm resizes a stage of Swin V2 only with its own class."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return super().forward(x_BHWC.permute(0, 3, 1, 2))


class Swin(Family):
    """timm's `swin_*` and `swinv2_*` of these two classes."""

    name = "swin_transformer and swin_transformer_v2 (Swin, Swin V2)"
    models: tuple[type[nn.Module], ...] = (SwinTransformer, SwinTransformerV2)
    blocks: tuple[type[nn.Module], ...] = (SwinTransformerBlock, SwinTransformerV2Block)
    hosts: ClassVar[Hosts] = {WindowAttentionV1: SwinHost, WindowAttentionV2: SwinV2Host}
    whole: ClassVar[Blocks] = {SwinTransformerBlock: WholeGridBlock, SwinTransformerV2Block: WholeGridBlockV2}
    post_norm: tuple[type[nn.Module], ...] = (SwinTransformerV2Block,)
    merging = SwinMerging
    gives_up = ("bias",)
    stages = "layers"
    grid_name = "output_resolution"
    """The attributes with the stages of a model and with the grid of a stage."""

    def paths(self, model: nn.Module) -> list[list[str]]:
        stages: Any = submodule(model, self.stages)
        return [
            [f"{self.stages}.{i}.blocks.{j}" for j in range(len(stage.blocks))]
            for i, stage in enumerate(stages)
        ]

    def merges(self, model: nn.Module) -> list[str]:
        return [f"{self.stages}.{i}.downsample" for i in range(1, len(self.recomputed(model)))]

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        size = vit(model).patch_embed.img_size
        return None if size is None else (int(size[0]), int(size[1]))

    def first_grid(self, model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of the patches of images."""
        return patch_grid(vit(model).patch_embed, size)

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        found, (height, width) = [], self.first_grid(model, size)
        for stage in self.recomputed(model):
            merge = stage.downsample
            if isinstance(merge, TokenMerging):
                height, width = merged_grid(merge, (height, width))
            elif not isinstance(merge, nn.Identity):
                height, width = -(-height // 2), -(-width // 2)  # timm pads an odd side
            found.append(Geometry(0, (height, width)))
        return found

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        """Resize with the same windows; a stage after deformable merging may have fewer tokens than timm expects.

        timm's `set_input_size` alone would scale the windows, and its constructor does not.
        """
        model.set_input_size(img_size=size, window_size=_windows(model))
        self.fit_stages(model, size)

    def fit_stages(self, model: nn.Module, size: tuple[int, int]) -> None:
        """Set the grids of the stages after deformable merging."""
        for stage, geometry in zip(self.recomputed(model), self.geometries(model, size), strict=True):
            expected: Any = getattr(stage, self.grid_name)
            setattr(stage, self.grid_name, geometry.grid)
            blocks: Any = stage.blocks
            for block in blocks if tuple(expected) != geometry.grid else ():
                block.set_input_size(feat_size=geometry.grid, window_size=block.window_size)

    def size_arguments(self, model: nn.Module) -> dict[str, Any]:
        windows = _windows(model)
        if isinstance(windows, int) or isinstance(windows[0], int):
            return {}  # as its constructor was told
        return {"img_size": self.image_size(model), "window_size": windows}

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return list(submodule(model, self.stages).children())


class SwinCr(Swin):
    """timm's `swinv2_cr_*`. Unless they were built with `window_size`, windows are a part of the grid of patches."""

    name = "swin_transformer_v2_cr (Swin V2)"
    models = (SwinTransformerV2Cr,)
    blocks = (SwinTransformerV2CrBlock,)
    hosts: ClassVar[Hosts] = {WindowMultiHeadAttention: SwinCrHost}
    whole: ClassVar[Blocks] = {SwinTransformerV2CrBlock: WholeGridBlockCr}
    post_norm = (SwinTransformerV2CrBlock,)
    stages = "stages"
    grid_name = "feat_size"

    def first_grid(self, model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
        height, width = vit(model).patch_embed.patch_size
        return size[0] // height, size[1] // width

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        if not _has_ratio(model):
            super().resize(model, size)
            return
        given = model._model_args
        model.set_input_size(img_size=size, window_ratio=given.get("window_ratio", 8))
        model._model_args = {**given, "img_size": size}  # timm notes windows, which are not fixed
        self.fit_stages(model, size)

    def size_arguments(self, model: nn.Module) -> dict[str, Any]:
        return {} if _has_ratio(model) else super().size_arguments(model)

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return self.recomputed(model)[-1]

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens.permute(0, 2, 3, 1)


def _has_ratio(model: nn.Module) -> bool:
    """Return whether the windows of a model are a part of its grid of patches."""
    given: Any = getattr(model, "_model_args", None)
    return given is not None and given.get("window_size") is None


def _windows(model: Any) -> Any:
    """Return the windows of the stages: a number as timm's constructor got it, or the sides for each stage."""
    return getattr(model, "_model_args", {}).get("window_size", model._ref_window_sizes)


FAMILIES = (Swin(), SwinCr())
