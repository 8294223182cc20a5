"""Hiera (arXiv:2306.00989), SAM 2's image encoder (arXiv:2408.00714) and MViTv2 (arXiv:2112.01526): stages whose first
layer pools its queries.

That layer has fewer queries than keys, and its block fewer tokens after it than before: it is no site, and stays.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import init_weight_vit, resample_abs_pos_embed, trunc_normal_, trunc_normal_tf_
from timm.models import named_apply
from timm.models.hiera import Hiera as HieraModel
from timm.models.hiera import HieraBlock, MaskUnitAttention, Reroll, Unroll
from timm.models.hieradet_sam2 import HieraDet, MultiScaleAttention, MultiScaleBlock
from timm.models.mvitv2 import MultiScaleAttention as PoolingAttention
from timm.models.mvitv2 import MultiScaleBlock as PoolingBlock
from timm.models.mvitv2 import MultiScaleVit
from torch import Tensor, nn

from ..attention.base import QKV, Geometry, Heads
from ..errors import UnsupportedModelError
from ..host import AttentionHost, GridHost, WindowHost
from ..map_structure import MapStructure, Size, Windows
from .plain import patch_grid
from .site import AnySize, Blocks, Family, Hosts, attention_of, merged_grid, submodule, vit


class OneList(Family):
    """Models of one list of blocks, `blocks`; `stage_ends` has the numbers of the last block of each stage."""

    def paths(self, model: Any) -> list[list[str]]:
        """Return the names of the blocks but the first of each later stage, which pools its queries."""
        ends = list(model.stage_ends)
        starts = [0, *(end + 2 for end in ends[:-1])]
        return [
            [f"blocks.{i}" for i in range(start, end + 1)] for start, end in zip(starts, ends, strict=True)
        ]

    def initialize(self, model: Any) -> None:
        """Initialize every weight as the constructor does by default."""
        super().initialize(model)
        for positions in model.parameters(recurse=False):
            trunc_normal_(positions, std=0.02)
        named_apply(partial(init_weight_vit, classifier_name="head.fc"), model)
        model.fix_init_weight()
        with torch.no_grad():
            for parameter in model.head.fc.parameters():
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
    return x.permute(0, *_places(bits), -1).flatten(1, -2)


def by_mask_unit(x_BNC: Tensor, grid: Size, side: int) -> Tensor:
    """Return tokens, which are row by row, in the order of mask units of `side` rows and columns."""
    bits = side.bit_length() - 1
    sizes = [size for length in grid for size in (length // side, *(2,) * bits)]
    places = _places(bits)
    back = [places.index(place) + 1 for place in range(1, len(places) + 1)]
    return x_BNC.unflatten(1, sizes).permute(0, *back, -1).flatten(1, -2)


def _places(bits: int) -> list[int]:
    """Return where the order of mask units has the bits of the row, then those of the column, from the highest."""
    return [*range(2 * bits + 1, 0, -2), *range(2 * bits + 2, 0, -2)]


def _sequence(grids: list[Size], x_BNC: Tensor) -> Tensor:
    """Return the tokens of the stage whose grid has as many, row by row; mask units of the last grid are tokens."""
    grid = next(grid for grid in grids if grid[0] * grid[1] == x_BNC.shape[1])
    return row_by_row(x_BNC, grid, grid[0] // grids[-1][0])


class MaskUnitHost(WindowHost):
    """Hiera: natively, softmax within mask units or of all tokens. Tokens come and go in the order of mask units."""

    shows_tokens = False

    counted_as = "heads"

    @property
    def side(self) -> int:
        """The rows and columns of a mask unit."""
        return math.isqrt(self.original.window_size)

    def windows(self, grid: Size) -> Windows:
        return Windows(grid, (self.side, self.side) if self.original.use_mask_unit_attn else grid)

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

    def check(self, model: Any) -> None:
        """Raise UnsupportedModelError unless mask units of an image are pooled to tokens, and none is dropped."""
        stages = len(model.stage_ends)
        given = (tuple(model.q_stride), tuple(model.mask_unit_size), model.q_pool)
        if given != ((2, 2), (2 ** (stages - 1),) * 2, stages - 1):
            raise UnsupportedModelError(
                f"a Hiera of {stages} stages with q_stride={given[0]}, mask_unit_size={given[1]} and q_pool={given[2]} "
                "is not supported: each stage but the first pools 2x2 tokens, up to one of each mask unit"
            )
        if model.patch_drop_rate:
            raise UnsupportedModelError(
                "a Hiera that drops mask units in training is not supported: build it with patch_drop_rate 0"
            )

    def host(self, model: nn.Module, block: nn.Module) -> AttentionHost:
        host = super().host(model, block)
        host.geometry = self.geometries(model, self.image_size(model))[self._stage(model, host)]
        return host

    def _stage(self, model: Any, host: Any) -> int:
        """Return the stage of a layer: each has half as many rows in a mask unit as the one before."""
        return len(model.stage_ends) - int(host.side).bit_length()

    def image_size(self, model: Any) -> tuple[int, int]:
        rows, columns = model.tokens_spatial_shape
        height, width = model.patch_stride
        return rows * height, columns * width

    known_size = fixed_size = image_size

    def patch_size(self, model: Any) -> tuple[int, int]:
        height, width = model.patch_stride
        return height, width

    def position_grid(self, model: Any) -> tuple[int, int]:
        height, width = model.tokens_spatial_shape
        return height, width

    def is_strict(self, model: nn.Module) -> bool:
        return True

    def geometries(self, model: Any, size: tuple[int, int]) -> list[Geometry]:
        rows, columns = (side // step for side, step in zip(size, model.patch_stride, strict=True))
        return [Geometry(0, (rows >> stage, columns >> stage)) for stage in range(len(model.stage_ends))]

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        """Resample the positions; those of a window are repeated in each, and stay."""
        steps = [step * unit for step, unit in zip(model.patch_stride, model.mask_unit_size, strict=True)]
        if any(side % step for side, step in zip(size, steps, strict=True)):
            raise ValueError(f"the sides of its images are multiples of {steps[0]} and {steps[1]}")
        old, stages = model.tokens_spatial_shape, self.geometries(model, size)
        model.tokens_spatial_shape, model.mask_spatial_shape = list(stages[0].grid), list(stages[-1].grid)
        order = [model.q_stride] * (len(stages) - 1)
        model.unroll = Unroll(size, model.patch_stride, order)
        model.reroll = Reroll(size, model.patch_stride, order, model.stage_ends, model.q_pool)
        if model.pos_embed_win is None:
            new = resample_abs_pos_embed(model.pos_embed.detach(), list(stages[0].grid), old, 0)
            model.pos_embed = nn.Parameter(new.clone(), requires_grad=model.pos_embed.requires_grad)
        for block in model.blocks:
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
        rows, columns = block.window_size
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

    def geometries(self, model: Any, size: tuple[int, int]) -> list[Geometry]:
        embedding, pools = model.patch_embed, [end + 1 in model.q_pool_blocks for end in model.stage_ends]
        pads = hasattr(embedding, "dynamic_feat_size")
        found, (rows, columns) = [], patch_grid(embedding, size) if pads else merged_grid(embedding, size)
        for pooled_next in pools:
            found.append(Geometry(0, (rows, columns)))
            if pooled_next:
                rows, columns = rows // model.q_stride[0], columns // model.q_stride[1]
        return found

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        """Change the size alone: positions are interpolated for each batch.

        Raises ValueError: the patches are no whole windows of the first stage, for each of which there are positions.
        """
        first, side = self.geometries(model, size)[0].grid, model.window_spec[0]
        if any(length % side for length in first):
            raise ValueError(f"its patches are no whole windows of {side}x{side}")
        super().resize(model, size)

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return [model]


# MViTv2: a convolution of each head pools queries, keys and values, in most blocks the keys and values to fewer.


class PoolingHost(GridHost):
    """MViTv2: natively, keys and values are of a smaller grid. Converted, they are pooled with a step of one token.

    b(i, j) = q_i · (r_h(row of i, row of j) + r_w(column of i, column of j)), where the rows of keys are `steps` apart;
    the queries are added to the output. Prefix tokens are not pooled and have no bias.
    """

    cuts_rows = False
    reads = ("q",)

    @property
    def steps(self) -> Size:
        """The rows and columns of tokens from one key of timm's layer to the next."""
        pool = self.original._modules.get("pool_k")
        rows, columns = getattr(self.original, "steps", None) or ((1, 1) if pool is None else pool.stride)
        return int(rows), int(columns)

    def prepare(self, bare: nn.Module) -> None:
        bare.steps = self.steps  # type: ignore[assignment]
        for name in ("pool_k", "pool_v"):
            pool: Any = copy.copy(bare._modules.get(name))
            if pool is not None:
                pool.stride = (1, 1)
                bare._modules[name] = pool

    def structure(self, grid: Size) -> MapStructure:
        return MapStructure() if self.steps == (1, 1) else MapStructure(reduction=("stride", self.steps))

    def native_pairs(self, geometry: Geometry) -> tuple[int, int]:
        rows, columns = (side // step for side, step in zip(geometry.grid, self.steps, strict=True))
        return geometry.num_tokens, geometry.num_prefix + rows * columns

    def parts(self, x_BNC: Tensor, grid: Size) -> dict[str, Tensor]:
        projected = zip(QKV, self._child("qkv", x_BNC).chunk(3, -1), strict=True)
        needs = {*self.operator.needs, *self.reads}
        return {part: self._pooled(part, x, grid) for part, x in projected if part in needs}

    def _pooled(self, part: str, x_BNC: Tensor, grid: Size) -> Tensor:
        x_BHDN = x_BNC.unflatten(2, (self.num_heads, -1)).permute(0, 2, 3, 1)
        if self._modules.get(f"pool_{part}") is not None:
            prefix, patches = x_BHDN.split([x_BHDN.shape[3] - grid[0] * grid[1], grid[0] * grid[1]], 3)
            images = self._child(f"pool_{part}", patches.flatten(0, 1).unflatten(2, grid))
            x_BHDN = torch.cat([prefix, images.flatten(2).unflatten(0, prefix.shape[:2])], 3)
        return self._child(f"norm_{part}", x_BHDN.permute(0, 3, 1, 2)).flatten(2)

    def attended(self, heads: Heads) -> Heads:
        return heads.each(lambda x: x, self._bias_of(heads.tokens().grid, heads.q, self.steps))

    def grid_bias(self, grid: Size, q_BHND: Tensor | None) -> Tensor | None:
        return self._bias_of(grid, q_BHND, (1, 1))

    def _bias_of(self, grid: Size, q_BHND: Tensor | None, steps: Size) -> Tensor | None:
        """Return the bias (B, H, N, M) of keys that are `steps` apart."""
        if q_BHND is None or not self.has_bias:
            return None
        prefix = q_BHND.shape[2] - grid[0] * grid[1]
        tables: Any = self.rel_pos_h, self.rel_pos_w
        rows, columns = map(_rows_of, tables, grid, self.steps, steps)
        q = q_BHND[:, :, prefix:].unflatten(2, grid)
        by_row = torch.einsum("bhrcd,rkd->bhrck", q, rows).unsqueeze(-1)
        by_column = torch.einsum("bhrcd,ckd->bhrck", q, columns).unsqueeze(-2)
        return F.pad((by_row + by_column).flatten(4, 5).flatten(2, 3), (prefix, 0, prefix, 0))

    def with_local(self, out_BHND: Tensor, heads: Heads) -> Tensor:
        queries: Any = heads.q
        return out_BHND + queries if self.original.residual_pooling else out_BHND


def _rows_of(table_RD: Tensor, side: int, own: int, step: int) -> Tensor:
    """Return the row of a table for each query and each key that is `step` tokens from the last one.

    Row r is of the distance r - (side - own), as timm's layer has it, whose keys are `own` apart; it has none for a key
    behind the last of those, and the nearest one is taken.
    """
    queries, keys = (torch.arange(0, side, each, device=table_RD.device) for each in (1, step))
    return table_RD[(queries[:, None] - keys + side - own).clamp_min(0)]


class WholePoolingBlock(PoolingBlock):
    """timm's block of MViTv2 whose attention returns the tokens alone, without their grid, which stays."""

    def forward(self, x_BNC: Tensor, feat_size: list[int]) -> tuple[Tensor, list[int]]:
        x_BNC = x_BNC + self.drop_path1(self.attn(self.norm1(x_BNC), feat_size))
        normed = self.norm2(x_BNC)
        shortcut = x_BNC if self.shortcut_proj_mlp is None else self.shortcut_proj_mlp(normed)
        return shortcut + self.drop_path2(self.mlp(normed)), feat_size


class MViTv2(Family):
    """timm's `mvitv2_*`, of one size of square images."""

    name = "mvitv2 (MViTv2)"
    models = (MultiScaleVit,)
    blocks = (PoolingBlock,)
    hosts: ClassVar[Hosts] = {PoolingAttention: PoolingHost}
    whole: ClassVar[Blocks] = {PoolingBlock: WholePoolingBlock}
    gives_up = ("bias",)
    resized_when_loaded = True

    def paths(self, model: nn.Module) -> list[list[str]]:
        """Return the names of the blocks but the first of each later stage, which pools its queries."""
        return [
            [f"stages.{i}.blocks.{name}" for name in list(submodule(stage, "blocks")._modules)[min(i, 1) :]]
            for i, stage in enumerate(self.recomputed(model))
        ]

    def check(self, model: nn.Module) -> None:
        """Raise UnsupportedModelError unless convolutions pool the tokens, and positions are relative."""
        parts = dict(model.named_modules())
        first = parts.get("stages.0.blocks.0.attn.pool_q")
        pools: list[Any] = [part for name, part in parts.items() if ".attn.pool_" in name]
        odd = all(
            isinstance(pool, nn.Conv2d) and all(side % 2 for side in pool.kernel_size) for pool in pools
        )
        starts = first is None or first.stride == (1, 1)
        per_head = not any(getattr(part, "unshared", False) for part in parts.values())
        if not (odd and starts and per_head and vit(model).pos_embed is None):
            raise UnsupportedModelError(
                "a MultiScaleVit is supported with mode=conv, kernels of an odd size, stride_q=(1, 1) in its first "
                "stage and use_abs_pos=False alone"
            )

    def image_size(self, model: Any) -> tuple[int, int]:
        (rows, columns), (down, right) = model.stages[0].feat_size, model.patch_embed.proj.stride
        return rows * down, columns * right

    known_size = fixed_size = image_size

    def is_strict(self, model: nn.Module) -> bool:
        return True

    def geometries(self, model: Any, size: tuple[int, int]) -> list[Geometry]:
        own, found = self.image_size(model), []
        for stage in model.stages:
            rows, columns = (
                new * side // old for new, side, old in zip(size, stage.feat_size, own, strict=True)
            )
            found.append(Geometry(model.num_prefix_tokens, (rows, columns)))
        return found

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        """Resample the tables of relative positions along their length, as timm does when it loads weights.

        Raises ValueError: images are not square, or a layer would not pool whole steps.
        """
        step = self._step(model)
        if size[0] != size[1] or size[0] % step:
            raise ValueError(f"its images are square, and their sides multiples of {step}")
        before = None
        for stage, geometry in zip(model.stages, self.geometries(model, size), strict=True):
            for block in stage.blocks:
                _fit_tables(attention_of(block), (before or geometry.grid)[0])
                before = geometry.grid
            stage.feat_size = geometry.grid

    def _step(self, model: Any) -> int:
        """Return the pixels of which the sides of images are multiples, so that each layer pools whole steps."""
        pixels, found = self.image_size(model)[0], 1
        for stage in model.stages:
            pools = [attention_of(block)._modules.get("pool_k") for block in stage.blocks]
            for step in [1, *(pool.stride[0] for pool in pools if pool is not None)]:
                found = math.lcm(found, pixels // stage.feat_size[0] * step)
        return found

    def sizes(self, block: Any) -> tuple[int, int, int]:
        """Return the width after a block, whose MLP may widen it, and the sizes of its attention."""
        _, heads, head_dim = super().sizes(block)
        return int(block.mlp.fc2.out_features), heads, head_dim

    def in_sequence(self, out: Any) -> Tensor:
        return out[0]

    def attention_input(self, block: nn.Module) -> None:
        return None  # a block returns the grid, too

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return list(submodule(model, "stages").children())

    def initialize(self, model: nn.Module) -> None:
        super().initialize(model)
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("rel_pos_h", "rel_pos_w", "cls_token"):
                trunc_normal_tf_(parameter, std=0.02)


def _fit_tables(layer: Any, side: int) -> None:
    """Resample the tables of a layer for another number of rows and columns of its input."""
    pools: list[Any] = [layer._modules.get(name) for name in ("pool_q", "pool_k")]
    length = 2 * (side // min(1 if pool is None else pool.stride[0] for pool in pools)) - 1
    for name in ("rel_pos_h", "rel_pos_w"):
        old = layer._parameters.get(name)
        if old is not None and len(old) != length:
            new = F.interpolate(old.detach().T[None], length, mode="linear")[0].T
            layer._parameters[name] = nn.Parameter(new.clone(), requires_grad=old.requires_grad)


FAMILIES = (Hiera(), Sam2(), MViTv2())
