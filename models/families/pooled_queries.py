"""Hiera (arXiv:2306.00989) and SAM 2's image encoder (arXiv:2408.00714): stages whose first layer pools its queries.

That layer has fewer queries than keys, and its block fewer tokens after it than before: it is no site, and stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import init_weight_vit, resample_abs_pos_embed, trunc_normal_
from timm.models import named_apply
from timm.models.hiera import Hiera as HieraModel
from timm.models.hiera import HieraBlock, MaskUnitAttention, Reroll, Unroll
from timm.models.hieradet_sam2 import HieraDet, MultiScaleAttention, MultiScaleBlock
from torch import Tensor, nn

from ..attention.base import Geometry, Heads
from ..errors import UnsupportedModelError
from ..host import AttentionHost, WindowHost
from ..map_structure import Size, Windows
from .plain import patch_grid
from .site import AnySize, Blocks, Family, Hosts, attention_of, merged_grid, submodule


class OneList(Family):
    """Models of one list of blocks, `blocks`; `stage_ends` has the numbers of the last block of each stage."""

    def paths(self, model: nn.Module) -> list[list[str]]:
        """Return the names of the blocks but the first of each later stage, which pools its queries."""
        whole: Any = model
        ends = list(whole.stage_ends)
        starts = [0, *(end + 2 for end in ends[:-1])]
        return [
            [f"blocks.{i}" for i in range(start, end + 1)] for start, end in zip(starts, ends, strict=True)
        ]

    def initialize(self, model: nn.Module) -> None:
        """Initialize every weight as the constructor does by default."""
        super().initialize(model)
        whole: Any = model
        for positions in model.parameters(recurse=False):
            trunc_normal_(positions, std=0.02)
        named_apply(partial(init_weight_vit, classifier_name="head.fc"), model)
        whole.fix_init_weight()
        with torch.no_grad():
            for parameter in whole.head.fc.parameters():
                parameter.mul_(0.001)

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return list(submodule(model, "blocks").children())[-1]


# Hiera: tokens are in the order of mask units, so that those that a pool takes together are one beside the other.
#
# A mask unit of 2^m x 2^m tokens has places with m bits for its rows and columns. The order is: the lowest bits of
# row and column, then the next ones, and last the row and the column of the mask unit.


def row_by_row(x_BNC: Tensor, grid: Size, side: int) -> Tensor:
    """Return tokens, which are in the order of mask units of `side` rows and columns, row by row."""
    bits = side.bit_length() - 1
    x = x_BNC.unflatten(1, (*(2, 2) * bits, *(length // side for length in grid)))
    rows: Tensor = x.permute(0, *_places(bits), -1).flatten(1, -2)
    return rows


def by_mask_unit(x_BNC: Tensor, grid: Size, side: int) -> Tensor:
    """Return tokens, which are row by row, in the order of mask units of `side` rows and columns."""
    bits = side.bit_length() - 1
    sizes = [size for length in grid for size in (length // side, *(2,) * bits)]
    places = _places(bits)
    back = [places.index(place) + 1 for place in range(1, len(places) + 1)]
    units: Tensor = x_BNC.unflatten(1, sizes).permute(0, *back, -1).flatten(1, -2)
    return units


def _places(bits: int) -> list[int]:
    """Return where the order of mask units has the bits of the row, then those of the column, from the highest."""
    return [*range(2 * bits + 1, 0, -2), *range(2 * bits + 2, 0, -2)]


def _sequence(grids: list[Size], x_BNC: Tensor) -> Tensor:
    """Return the tokens of the stage whose grid has as many, row by row; mask units of the last grid are tokens."""
    grid = next(grid for grid in grids if grid[0] * grid[1] == x_BNC.shape[1])
    return row_by_row(x_BNC, grid, grid[0] // grids[-1][0])


class MaskUnitHost(WindowHost):
    """Hiera: natively, softmax within mask units or of all tokens. Tokens come and go in the order of mask units."""

    counted_as = "heads"

    @property
    def side(self) -> int:
        """The rows and columns of a mask unit."""
        layer: Any = self.original
        return math.isqrt(layer.window_size)

    def windows(self, grid: Size) -> Windows:
        layer: Any = self.original
        return Windows(grid, (self.side, self.side) if layer.use_mask_unit_attn else grid)

    def project(self, x: Tensor, size: Size | None = None) -> Heads:  # type: ignore[override]
        """Compute the projections of the tokens row by row."""
        return super().project(row_by_row(x, self.grid, self.side), self.grid)

    def merge(self, out_BHND: Tensor, x: Tensor) -> Tensor:
        return by_mask_unit(super().merge(out_BHND, x), self.grid, self.side)

    @property
    def grid(self) -> Size:
        """The grid of the stage: that of the model's size, which no tensor shows."""
        assert self.geometry is not None
        return self.geometry.grid


class Hiera(OneList):
    """timm's `hiera_*`, of one image size."""

    name = "hiera (Hiera)"
    models = (HieraModel,)
    blocks = (HieraBlock,)
    hosts: ClassVar[Hosts] = {MaskUnitAttention: MaskUnitHost}
    resized_when_loaded = True
    exported_hosted = True

    def check(self, model: nn.Module) -> None:
        """Raise UnsupportedModelError unless mask units of an image are pooled to tokens, and none is dropped."""
        whole: Any = model
        stages = len(whole.stage_ends)
        given = (tuple(whole.q_stride), tuple(whole.mask_unit_size), whole.q_pool)
        if given != ((2, 2), (2 ** (stages - 1),) * 2, stages - 1):
            raise UnsupportedModelError(
                f"a Hiera of {stages} stages with q_stride={given[0]}, mask_unit_size={given[1]} and q_pool={given[2]} "
                "is not supported: each stage but the first pools 2x2 tokens, up to one of each mask unit"
            )
        if whole.patch_drop_rate:
            raise UnsupportedModelError(
                "a Hiera that drops mask units in training is not supported: build it with patch_drop_rate 0"
            )

    def host(self, model: nn.Module, block: nn.Module) -> AttentionHost:
        host = super().host(model, block)
        host.geometry = self.geometries(model, self.image_size(model))[self._stage(model, host)]
        return host

    def _stage(self, model: nn.Module, host: Any) -> int:
        """Return the stage of a layer: each has half as many rows in a mask unit as the one before."""
        whole: Any = model
        return len(whole.stage_ends) - int(host.side).bit_length()

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        whole: Any = model
        rows, columns = whole.tokens_spatial_shape
        height, width = whole.patch_stride
        return rows * height, columns * width

    known_size = fixed_size = image_size

    def patch_size(self, model: nn.Module) -> tuple[int, int]:
        whole: Any = model
        height, width = whole.patch_stride
        return height, width

    def position_grid(self, model: nn.Module) -> tuple[int, int]:
        whole: Any = model
        height, width = whole.tokens_spatial_shape
        return height, width

    def is_strict(self, model: nn.Module) -> bool:
        return True

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        whole: Any = model
        rows, columns = (side // step for side, step in zip(size, whole.patch_stride, strict=True))
        return [Geometry(0, (rows >> stage, columns >> stage)) for stage in range(len(whole.stage_ends))]

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        """Resample the positions; those of a window are repeated in each, and stay."""
        whole: Any = model
        steps = [step * unit for step, unit in zip(whole.patch_stride, whole.mask_unit_size, strict=True)]
        if any(side % step for side, step in zip(size, steps, strict=True)):
            raise ValueError(f"the sides of its images are multiples of {steps[0]} and {steps[1]}")
        old, stages = whole.tokens_spatial_shape, self.geometries(model, size)
        whole.tokens_spatial_shape, whole.mask_spatial_shape = list(stages[0].grid), list(stages[-1].grid)
        order = [whole.q_stride] * (len(stages) - 1)
        whole.unroll = Unroll(size, whole.patch_stride, order)
        whole.reroll = Reroll(size, whole.patch_stride, order, whole.stage_ends, whole.q_pool)
        if whole.pos_embed_win is None:
            new = resample_abs_pos_embed(whole.pos_embed.detach(), list(stages[0].grid), old, 0)
            whole.pos_embed = nn.Parameter(new.clone(), requires_grad=whole.pos_embed.requires_grad)
        for block in whole.blocks:
            if isinstance(block.attn, MaskUnitHost) and not block.attn.permanent:
                block.attn.geometry = stages[self._stage(model, block.attn)]

    def sizes(self, block: nn.Module) -> tuple[int, int, int]:
        whole, layer = block, attention_of(block)
        width = int(whole.dim_out)  # type: ignore[arg-type]
        heads = int(getattr(getattr(layer, "original", layer), "heads", 0))  # 0 without attention
        return width, heads, width // max(heads, 1) if heads else 0

    def sequencer(self, model: nn.Module) -> Callable[[Any], Tensor]:
        return partial(_sequence, [each.grid for each in self.geometries(model, self.image_size(model))])


# SAM 2's image encoder: the same with windows of any size, over images of any size.


class DetectorHost(WindowHost):
    """SAM 2: natively, softmax within windows or of all tokens."""

    def windows(self, grid: Size) -> Windows:
        [block] = self._block
        rows, columns = block.window_size  # type: ignore[misc]
        return Windows(grid, (rows, columns) if rows else grid)


class WholeGridBlock(MultiScaleBlock):
    """timm's block of SAM 2 whose attention gets the whole grid (B, height, width, C) instead of windows."""

    @property
    def is_windowed(self) -> bool:  # type: ignore[override]
        """No windows; the object's own `is_windowed` is what timm gave it."""
        return False


class Sam2(OneList, AnySize):
    """timm's `sam2_hiera_*` and `hieradet_*`. They take images of any size, and interpolate their positions to it."""

    name = "hieradet_sam2 (image encoder of SAM 2)"
    models = (HieraDet,)
    blocks = (MultiScaleBlock,)
    hosts: ClassVar[Hosts] = {MultiScaleAttention: DetectorHost}
    whole: ClassVar[Blocks] = {MultiScaleBlock: WholeGridBlock}

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        whole: Any = model
        embedding, pools = whole.patch_embed, [end + 1 in whole.q_pool_blocks for end in whole.stage_ends]
        pads = hasattr(embedding, "dynamic_feat_size")
        found, (rows, columns) = [], patch_grid(embedding, size) if pads else merged_grid(embedding, size)
        for pooled_next in pools:
            found.append(Geometry(0, (rows, columns)))
            if pooled_next:
                rows, columns = rows // whole.q_stride[0], columns // whole.q_stride[1]
        return found

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        """Change the size alone: positions are interpolated for each batch.

        Raises ValueError: the patches are no whole windows of the first stage, for each of which there are positions.
        """
        whole: Any = model
        first, side = self.geometries(model, size)[0].grid, whole.window_spec[0]
        if any(length % side for length in first):
            raise ValueError(f"its patches are no whole windows of {side}x{side}")
        super().resize(model, size)

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return [model]


FAMILIES = (Hiera(), Sam2())
