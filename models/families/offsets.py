"""A bias for each distance of two tokens, down and right.

TinyViT (arXiv:2207.10666), LeViT (arXiv:2104.01136) and EfficientFormer (arXiv:2206.01191) have it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.models.efficientformer import Attention as EfficientAttention
from timm.models.efficientformer import EfficientFormer as EfficientFormerModel
from timm.models.efficientformer import MetaBlock1d
from timm.models.levit import Attention as LevitAttention
from timm.models.levit import Levit, LevitBlock
from timm.models.tiny_vit import Attention as TinyAttention
from timm.models.tiny_vit import TinyVit, TinyVitBlock
from torch import Tensor, nn

from ..attention.base import QKV, Geometry, Heads
from ..errors import UnsupportedModelError
from ..host import WindowHost
from ..map_structure import Size, Windows, offsets, resample_table
from .site import OWN_PLACES, AnySize, Blocks, Hosts, OneSize, attention_of, convolved, named_heads, submodule

OWN_PLACES[MetaBlock1d] = "token_mixer"

BUILT = (7, 7)
"""The grid of EfficientFormer's tables as timm builds them; its layers do not say it."""


def table_grid(layer: Any) -> Size:
    """Return the grid that the table of a layer is of."""
    height, width = getattr(layer, "resolution", BUILT)
    return height, width


def distances(grid: Size, device: torch.device) -> Tensor:
    """Return the row of the table of biases for each pair of tokens, (N, N): |Δ row| · columns + |Δ column|."""
    rows, columns = (torch.arange(side, device=device) for side in grid)
    down, right = ((at[:, None] - at).abs() for at in (rows, columns))
    index = down[:, None, :, None] * grid[1] + right[None, :, None, :]
    return index.flatten(2, 3).flatten(0, 1)


def resample_distances(table_HR: Tensor, old: Size, new: Size) -> Tensor:
    """Return a table for the distances of another grid: it is resampled with both signs of them, and then cut."""
    if old == new:
        return table_HR
    places = [(torch.arange(2 * side - 1, device=table_HR.device) - (side - 1)).abs() for side in old]
    signed_RH = table_HR.unflatten(1, old)[:, places[0]][:, :, places[1]].flatten(1).T
    resampled = resample_table(signed_RH, offsets(old), offsets(new)).T.unflatten(1, offsets(new))
    return resampled[:, new[0] - 1 :, new[1] - 1 :].flatten(1)


def fit_distances(layer: Any, grid: Size) -> None:
    """Set a layer of timm to another grid: its table, and which row of it belongs to two tokens."""
    table = layer.attention_biases
    new = resample_distances(table.detach(), table_grid(layer), grid)
    layer._parameters["attention_biases"] = nn.Parameter(new.clone(), requires_grad=table.requires_grad)
    layer.resolution = tuple(grid)
    index = distances(grid, table.device).unflatten(0, grid)
    step = getattr(layer, "stride", 1)
    layer._buffers["attention_bias_idxs"] = index[::step, ::step].flatten(0, 1)
    layer.attention_bias_cache = {}


def forget_biases(model: nn.Module) -> None:
    """Drop the biases that timm keeps between passes in eval mode."""
    for module in model.modules():
        if hasattr(module, "attention_bias_cache"):
            module.attention_bias_cache = {}  # type: ignore[assignment]


class DistanceHost(WindowHost):
    """A layer with such a bias; q, k and v are side by side in each head of its projection."""

    cuts_rows = False
    reduction = ()

    @property
    def resolution(self) -> Size:
        """The grid of the table."""
        return table_grid(self.original)

    def windows(self, grid: Size) -> Windows:
        return Windows(grid, self.resolution)

    def window_bias(self, windows: Windows, like: Tensor) -> Tensor:
        return self.table_bias(windows.window).to(like.dtype)

    def grid_bias(self, grid: Size, q_BHND: Tensor | None) -> Tensor | None:
        return self.table_bias(grid) if self.has_bias else None

    def table_bias(self, grid: Size) -> Tensor:
        """Return the bias of all pairs of tokens of a grid, (1, H, N, N)."""
        table = resample_distances(self.get_parameter("attention_biases"), self.resolution, grid)
        return table[:, distances(grid, table.device)].unsqueeze(0)

    def fit_bias(self, grid: Size) -> None:
        fit_distances(self.original, grid)

    def parts(self, x_BNC: Tensor, grid: Size) -> dict[str, Tensor]:
        layer: Any = self.original
        by_head = self._project(x_BNC).unflatten(2, (self.num_heads, -1))
        widths = [layer.key_dim, layer.key_dim, layer.val_dim]
        return {part: x.flatten(2) for part, x in zip(QKV, by_head.split(widths, 3), strict=True)}


class TinyHost(DistanceHost):
    """TinyViT, whose layers hold their norm."""

    def _project(self, x_BNC: Tensor) -> Tensor:
        return self._child("qkv", self._child("norm", x_BNC))


class WholeTinyBlock(TinyVitBlock):
    """timm's block of TinyViT whose attention gets the whole grid (B, height, width, C) instead of windows."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = x_BHWC + self.drop_path1(self.attn(x_BHWC))
        x_BHWC = self.local_conv(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x_BHWC + self.drop_path2(self.mlp(x_BHWC))


class Tiny(AnySize):
    """timm's `tiny_vit_*`. Sites are the blocks of windows; a stage of convolutions alone is not counted."""

    name = "tiny_vit (TinyViT)"
    models = (TinyVit,)
    blocks = (TinyVitBlock,)
    hosts: ClassVar[Hosts] = {TinyAttention: TinyHost}
    whole: ClassVar[Blocks] = {TinyVitBlock: WholeTinyBlock}
    post_norm = (TinyVitBlock,)
    gives_up = ("bias",)
    resized_when_loaded = True
    rerun = ("stages",)

    def paths(self, model: nn.Module) -> list[list[str]]:
        return [
            paths
            for paths, is_site in zip(super().paths(model), self._with_sites(model), strict=True)
            if is_site
        ]

    def _with_sites(self, model: nn.Module) -> list[bool]:
        stages: Any = model.stages
        return [hasattr(stage, "downsample") for stage in stages]

    def channels(self, model: Any) -> int:
        return int(model.patch_embed.conv1.conv.in_channels)

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        found, (height, width) = [], (-(-size[0] // 4), -(-size[1] // 4))
        for is_site in self._with_sites(model):
            if is_site:
                height, width = -(-height // 2), -(-width // 2)
                found.append(Geometry(0, (height, width)))
        return found

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return [model]

    def forget(self, model: nn.Module) -> None:
        forget_biases(model)


class LevitHost(DistanceHost):
    """LeViT and EfficientFormer: values r times as wide as keys, as r heads with the same queries and keys.

    Its input is (B, N, C), or (B, C, height, width).
    """

    shows_tokens = False

    def __init__(self, original: Any, *more: Any) -> None:
        super().__init__(original, *more)
        if original.val_dim % original.key_dim:
            raise UnsupportedModelError(
                f"a head of {type(original).__name__} has keys of width {original.key_dim} and values of "
                f"{original.val_dim}, which is no multiple: this is not supported"
            )

    def project(self, x: Tensor, size: Size | None = None) -> Heads:  # type: ignore[override]
        """Compute q, k and v of the heads."""
        return super().project(x.flatten(2).transpose(1, 2) if x.dim() == 4 else x, self.resolution)

    def parts(self, x_BNC: Tensor, grid: Size) -> dict[str, Tensor]:
        parts = super().parts(x_BNC, grid)
        for part in ("q", "k"):
            by_head = parts[part].unflatten(2, (self.num_heads, -1))
            parts[part] = by_head.repeat_interleave(times(self.original), 2).flatten(2)
        return parts

    def table_bias(self, grid: Size) -> Tensor:
        return super().table_bias(grid).repeat_interleave(times(self.original), 1)

    def merge(self, out_BHND: Tensor, x: Tensor) -> Tensor:
        """Join the heads and project them back; return the shape of the input."""
        out = out_BHND.transpose(1, 2).flatten(2)
        image = out.transpose(1, 2).unflatten(2, self.resolution) if x.dim() == 4 else out
        return self._child("proj", image)

    def all_pairs(self, geometry: Geometry) -> int:
        """Return the pairs of queries and keys as costs count them: timm forms a map once for r heads."""
        return super().all_pairs(geometry) * (1 + times(self.original)) // 2

    def _project(self, x_BNC: Tensor) -> Tensor:
        if not getattr(self.original, "use_conv", False):
            return self._child("qkv", x_BNC)
        image = x_BNC.transpose(1, 2).unflatten(2, self.resolution)
        return self._child("qkv", image).flatten(2).transpose(1, 2)

    def _by_head(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(2, (self.num_heads * times(self.original), -1)).transpose(1, 2)


def times(layer: Any) -> int:
    """Return how many heads of the width of its keys the values of a head are."""
    return int(layer.val_dim // layer.key_dim)


class LeViT(OneSize):
    """timm's `levit_*` and `levit_conv_*`, of one image size. Attention between stages stays."""

    name = "levit (LeViT)"
    models = (Levit,)
    blocks = (LevitBlock,)
    hosts: ClassVar[Hosts] = {LevitAttention: LevitHost}
    post_norm = (LevitBlock,)
    gives_up = ("bias",)
    cannot: ClassVar[Mapping[str, str]] = {
        **OneSize.cannot,
        "none": "takes its image size from its attention: name an operator, such as uniform",
    }
    rerun = ("stages",)

    def image_size(self, model: Any) -> tuple[int, int] | None:
        layer = attention_of(model.stages[0].blocks[0])
        height, width = getattr(layer, "original", layer).resolution
        return height * model.stem.stride, width * model.stem.stride

    def patch_size(self, model: Any) -> tuple[int, int]:
        return model.stem.stride, model.stem.stride

    def channels(self, model: Any) -> int:
        return int(model.stem.conv1.linear.in_channels)

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        step, _ = self.patch_size(model)
        found, (height, width) = [], (size[0] // step, size[1] // step)
        for _ in self.paths(model):
            found.append(Geometry(0, (height, width)))
            height, width = -(-height // 2), -(-width // 2)
        return found

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        """Resample the biases, of attention between stages as well."""
        step, _ = self.patch_size(model)
        if any(side % step for side in size):
            raise ValueError(f"the sides of its images are multiples of {step}")
        before = None
        for stage, geometry in zip(model.stages, self.geometries(model, size), strict=True):
            if before is not None:
                _fit_downsampling(stage.downsample.attn_downsample, before)
            for block in stage.blocks:
                layer = getattr(block.attn, "original", block.attn)
                if "attention_biases" in layer._parameters:
                    fit_distances(layer, geometry.grid)
                layer.resolution = geometry.grid
            before = geometry.grid

    def sizes(self, block: Any) -> tuple[int, int, int]:
        layer = getattr(block.attn, "original", block.attn)
        return int(block.mlp.ln1.linear.weight.shape[1]), layer.num_heads * times(layer), int(layer.key_dim)

    def classifiers(self, model: nn.Module) -> dict[str, nn.Module]:
        return named_heads(model)

    def in_sequence(self, out: Tensor) -> Tensor:
        return out.flatten(2).transpose(1, 2) if out.dim() == 4 else out

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return self.in_sequence(tokens).unflatten(1, geometry.grid)

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return [model]

    def forget(self, model: nn.Module) -> None:
        forget_biases(model)


def _fit_downsampling(layer: Any, grid: Size) -> None:
    """Set the attention between two stages to another grid of the stage before."""
    fit_distances(layer, grid)
    if hasattr(layer.q.down, "resolution"):
        layer.q.down.resolution = grid


class EfficientFormer(OneSize):
    """timm's `efficientformer_*`: attention in the last blocks, over (B, N, C). Blocks of pooling are no sites."""

    name = "efficientformer (EfficientFormer)"
    models = (EfficientFormerModel,)
    blocks = (MetaBlock1d,)
    hosts: ClassVar[Hosts] = {EfficientAttention: LevitHost}
    gives_up = ("bias",)
    sized_when_built = False  # timm's constructor takes `img_size` without using it

    def paths(self, model: nn.Module) -> list[list[str]]:
        """Return the names of the blocks with attention, which only the last stage has."""
        return [
            [path for path in paths if isinstance(submodule(model, path), MetaBlock1d)]
            for paths in super().paths(model)
        ]

    def check(self, model: nn.Module) -> None:
        """Raise UnsupportedModelError if no block has attention."""
        if not any(self.paths(model)):
            raise UnsupportedModelError(
                "an EfficientFormer with num_vit=0 is not supported: none has attention"
            )

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Return the size that the model was resized to, else that of the tables that timm builds."""
        own: Any = getattr(model, "img_size", None)
        if own is None:
            steps = [each.stride for part in _reducing(model) for each in part]
            own = [
                math.prod(axis, start=side)
                for side, axis in zip(BUILT, zip(*steps, strict=True), strict=True)
            ]
        height, width = own
        return int(height), int(width)

    def channels(self, model: nn.Module) -> int:
        return _reducing(model)[0][0].in_channels

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        found, grid = [], size
        for part in _reducing(model):
            for convolution in part:
                grid = convolved(convolution, grid)
            found.append(Geometry(0, grid))
        return found[1:]

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        """Resample the biases."""
        super().resize(model, size)
        for site in self.sites(model):
            layer = site.layer(model)
            layer = getattr(layer, "original", layer)
            if "attention_biases" in layer._parameters:
                fit_distances(layer, site.shape.geometry.grid)
            layer.resolution = site.shape.geometry.grid

    def sizes(self, block: nn.Module) -> tuple[int, int, int]:
        width, heads, head_dim = super().sizes(block)
        count = times(getattr(attention_of(block), "original", attention_of(block))) if heads else 1
        return width, heads * count, head_dim // count

    def initialize(self, model: nn.Module) -> None:
        super().initialize(model)
        for name, table in model.named_parameters():
            if name.endswith("attention_biases"):
                nn.init.zeros_(table)

    def classifiers(self, model: nn.Module) -> dict[str, nn.Module]:
        return named_heads(model)

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return submodule(model, "norm")

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens.unflatten(1, geometry.grid)

    def forget(self, model: nn.Module) -> None:
        forget_biases(model)


def _reducing(model: Any) -> list[list[nn.Conv2d]]:
    """Return the convolutions of EfficientFormer that reduce the grid: of the stem, then before each stage."""
    parts = (model.stem, *(stage.downsample for stage in model.stages))
    return [[module for module in part.children() if isinstance(module, nn.Conv2d)] for part in parts]


FAMILIES = (Tiny(), LeViT(), EfficientFormer())
