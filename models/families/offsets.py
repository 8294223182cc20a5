"""TinyViT (arXiv:2207.10666) and LeViT (arXiv:2104.01136): a bias for each distance of two tokens, down and right."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.models.tiny_vit import Attention as TinyAttention
from timm.models.tiny_vit import TinyVit, TinyVitBlock
from torch import Tensor, nn

from ..attention.base import QKV, Geometry
from ..host import WindowHost
from ..map_structure import Size, Windows, offsets, resample_table
from .site import AnySize, Blocks, Hosts


def distances(grid: Size, device: torch.device) -> Tensor:
    """Return the row of the table of biases for each pair of tokens, (N, N): |Δ row| · columns + |Δ column|."""
    rows, columns = (torch.arange(side, device=device) for side in grid)
    down, right = ((at[:, None] - at).abs() for at in (rows, columns))
    index = down[:, None, :, None] * grid[1] + right[None, :, None, :]
    found: Tensor = index.flatten(2, 3).flatten(0, 1)
    return found


def resample_distances(table_HR: Tensor, old: Size, new: Size) -> Tensor:
    """Return a table for the distances of another grid: it is resampled with both signs of them, and then cut."""
    if old == new:
        return table_HR
    places = [(torch.arange(2 * side - 1, device=table_HR.device) - (side - 1)).abs() for side in old]
    signed_RH = table_HR.unflatten(1, old)[:, places[0]][:, :, places[1]].flatten(1).T
    resampled = resample_table(signed_RH, offsets(old), offsets(new)).T.unflatten(1, offsets(new))
    found: Tensor = resampled[:, new[0] - 1 :, new[1] - 1 :].flatten(1)
    return found


def fit_distances(layer: Any, grid: Size) -> None:
    """Set a layer of timm to another grid: its table, and which row of it belongs to two tokens."""
    table = layer.attention_biases
    new = resample_distances(table.detach(), tuple(layer.resolution), grid)
    layer._parameters["attention_biases"] = nn.Parameter(new.clone(), requires_grad=table.requires_grad)
    layer.resolution = tuple(grid)
    layer._buffers["attention_bias_idxs"] = distances(grid, table.device)
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
        layer: Any = self.original
        height, width = layer.resolution
        return height, width

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
        out_BHWC: Tensor = x_BHWC + self.drop_path2(self.mlp(x_BHWC))
        return out_BHWC


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

    def channels(self, model: nn.Module) -> int:
        whole: Any = model
        return int(whole.patch_embed.conv1.conv.in_channels)

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


FAMILIES = (Tiny(),)
