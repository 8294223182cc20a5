"""Other stages of windows: DaViT (arXiv:2204.03645), NesT (arXiv:2105.12723), GC ViT (arXiv:2206.09959) and MaxViT
(arXiv:2204.01697)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

from timm.models.davit import DaVit, SpatialBlock
from timm.models.davit import WindowAttention as DavitAttention
from timm.models.gcvit import GlobalContextVit, GlobalContextVitBlock, WindowAttentionGlobal
from timm.models.maxxvit import (
    AttentionCl,
    MaxxVit,
    ParallelPartitionAttention,
    PartitionAttention2d,
    PartitionAttentionCl,
    TransformerBlock2d,
)
from timm.models.nest import Attention as NestAttention
from timm.models.nest import Nest, TransformerLayer
from torch import Tensor, nn

from ..attention.base import QKV, Geometry
from ..host import AttentionHost, WindowHost, wrong_bias
from ..map_structure import Size, Windows, resample_plainly
from .site import AnySize, Blocks, Family, Hosts, OneSize, attention_of, size_of, submodule, vit


class BlockWindowHost(WindowHost):
    """A layer whose block says how large windows are."""

    def windows(self, grid: Size) -> Windows:
        return Windows(grid, tuple(self._block[0].window_size))


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
        return x_BHWC.permute(0, 3, 1, 2)


class Davit(AnySize):
    """timm's `davit_*`: sites are the blocks of windows. Attention of channels has no map of tokens, and stays."""

    name = "davit (DaViT)"
    models = (DaVit,)
    blocks = (SpatialBlock,)
    hosts: ClassVar[Hosts] = {DavitAttention: BlockWindowHost}
    whole: ClassVar[Blocks] = {SpatialBlock: WholeSpatialBlock}

    def paths(self, model: Any) -> list[list[str]]:
        return [
            [
                name
                for name, part in stage.named_modules(prefix=f"stages.{i}")
                if isinstance(part, SpatialBlock)
            ]
            for i, stage in enumerate(model.stages)
        ]

    def channels(self, model: Any) -> int:
        return int(model.stem.in_chs)

    def geometries(self, model: Any, size: tuple[int, int]) -> list[Geometry]:
        found, grid = [], (-(-size[0] // 4), -(-size[1] // 4))
        for stage in model.stages:
            if not isinstance(stage.downsample, nn.Identity):
                height, width = grid
                grid = -(-height // 2), -(-width // 2)
            found.append(Geometry(0, grid))
        return found

    def embedding(self, model: nn.Module) -> nn.Module:
        return submodule(model, "stem")

    def attention_input(self, block: nn.Module) -> None:
        return None  # a convolution of the grid comes first

    def in_sequence(self, out: Tensor) -> Tensor:
        return out.flatten(2).transpose(1, 2)

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return submodule(model, "norm_pre")


# NesT: each level has a quarter of the blocks of tokens of the one before, and all blocks are of one size.


def blocks_joined(x_BTMC: Tensor) -> Tensor:
    """Return blocks of tokens, squares of a square grid, as the grid (B, height, width, C)."""
    count, side = (math.isqrt(size) for size in x_BTMC.shape[1:3])
    x = x_BTMC.unflatten(2, (side, side)).unflatten(1, (count, count))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def blocks_cut(x_BHWC: Tensor, count: int) -> Tensor:
    """Return a grid as blocks of tokens, `count` down and `count` across, (B, T, M, C)."""
    side = x_BHWC.shape[1] // count
    x = x_BHWC.unflatten(2, (count, side)).unflatten(1, (count, side)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


class Joined(nn.Module):
    """`blocks_joined` as a module."""

    def forward(self, x_BTMC: Tensor) -> Tensor:
        return blocks_joined(x_BTMC)


class NestHost(WindowHost):
    """NesT: natively, softmax within the blocks of tokens."""

    side = 0
    """The rows and columns of a block."""

    def windows(self, grid: Size) -> Windows:
        return Windows(grid, (self.side, self.side))

    def merge(self, out_BHND: Tensor, x: Tensor) -> Tensor:
        """Join the heads channel by channel, as NesT does, and project them back."""
        out = self._child("proj_drop", self._child("proj", out_BHND.permute(0, 2, 3, 1).flatten(2)))
        return out.reshape(x.shape)


class WholeLayer(TransformerLayer):
    """timm's layer of NesT whose attention gets the whole grid (B, height, width, C) instead of blocks of tokens."""

    def forward(self, x_BTMC: Tensor) -> Tensor:
        attended = self.attn(blocks_joined(self.norm1(x_BTMC)))
        if attended.dim() == 4:  # it is 0 where there is no attention
            attended = blocks_cut(attended, math.isqrt(x_BTMC.shape[1]))
        x_BTMC = x_BTMC + self.drop_path1(attended)
        return x_BTMC + self.drop_path2(self.mlp(self.norm2(x_BTMC)))


class NesT(Family):
    """timm's `nest_*`. Images are square, and their patches are whole blocks at every level."""

    name = "nest (NesT)"
    models = (Nest,)
    blocks = (TransformerLayer,)
    hosts: ClassVar[Hosts] = {NestAttention: NestHost}
    exported_hosted = True
    whole: ClassVar[Blocks] = {TransformerLayer: WholeLayer}
    resized_when_loaded = True
    rerun = ("transformer_encoder",)

    def paths(self, model: nn.Module) -> list[list[str]]:
        return [
            [
                f"levels.{i}.transformer_encoder.{j}"
                for j in range(len(list(submodule(level, self.rerun[0]).children())))
            ]
            for i, level in enumerate(self.recomputed(model))
        ]

    def host(self, model: nn.Module, block: nn.Module) -> AttentionHost:
        found: Any = super().host(model, block)
        found.side = model.block_size
        return cast(AttentionHost, found)

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        return size_of(vit(model).patch_embed)

    def geometries(self, model: Any, size: tuple[int, int]) -> list[Geometry]:
        rows, columns = (side // model.patch_size for side in size)
        return [Geometry(0, (rows >> level, columns >> level)) for level in range(model.num_levels)]

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        """Resample the positions of each level."""
        blocks = 2 ** (model.num_levels - 1)
        if size[0] != size[1] or size[0] % (model.patch_size * blocks):
            raise ValueError(
                f"its images are square, and their sides multiples of {model.patch_size * blocks}"
            )
        model.patch_embed.set_input_size(img_size=size)
        model.block_size = size[0] // model.patch_size // blocks
        model.num_patches = model.patch_embed.num_patches
        model.seq_length = model.block_size**2
        for level, geometry in zip(model.levels, self.geometries(model, size), strict=True):
            level.block_size = model.block_size
            level.pos_embed = _positions(level.pos_embed, geometry.grid)

    def in_sequence(self, out: Tensor) -> Tensor:
        return blocks_joined(out).flatten(1, 2)

    def attention_input(self, block: nn.Module) -> nn.Module:
        return nn.Sequential(block.get_submodule("norm1"), Joined())

    def features(self, model: nn.Module, images: Tensor) -> Tensor:
        return vit(model).forward_features(images).permute(0, 2, 3, 1)

    def head(self, model: nn.Module, features: Tensor, *, pre_logits: bool = False) -> Tensor:
        return super().head(model, features.permute(0, 3, 1, 2), pre_logits=pre_logits)

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return list(submodule(model, "levels").children())


def _positions(old: nn.Parameter, grid: Size) -> nn.Parameter:
    """Return learned positions (1, T, M, C) for another grid, resampled without antialiasing."""
    before = blocks_joined(old.detach())
    size = (before.shape[1], before.shape[2])
    new = resample_plainly(before.flatten(1, 2), grid, size, 0, "bicubic").unflatten(1, grid)
    return nn.Parameter(blocks_cut(new, math.isqrt(old.shape[1])).clone(), requires_grad=old.requires_grad)


# GC ViT: windows, in every other block with queries that a convolution makes of the whole image.


class LocalHost(BlockWindowHost):
    """GC ViT: natively, softmax within windows with a relative position bias. Converted, the bias is of the grid."""

    def window_bias(self, windows: Windows, like: Tensor) -> Tensor:
        return self.table_bias().to(like.dtype)

    def table_bias(self) -> Tensor:
        """Return the bias of all pairs of tokens of the window that the layer is set to, (1, H, M, M)."""
        rel_pos: Any = self.rel_pos
        bias: Tensor = rel_pos.get_bias()
        return bias if bias.dim() == 4 else bias.unsqueeze(0)

    def grid_bias(self, grid: Size, q_BHND: Tensor | None) -> Tensor | None:
        if not self.has_bias:
            return None
        rel_pos: Any = self.rel_pos
        if tuple(rel_pos.window_size) != tuple(grid):
            raise wrong_bias(rel_pos.window_size, grid)
        return self.table_bias()

    def fit_bias(self, grid: Size) -> None:
        rel_pos: Any = self.rel_pos
        rel_pos.set_window_size(tuple(grid))


class WholeContextBlock(GlobalContextVitBlock):
    """timm's block of GC ViT whose attention gets the whole grid (B, height, width, C) instead of windows."""

    def _window_attn(self, x: Tensor, q_global: Tensor | None = None) -> Any:
        return self.attn(x)


class GCViT(OneSize):
    """timm's `gcvit_*`: sites are the blocks without queries of the whole image; the others stay. Windows are a part
    of the image, whose size the model is built for."""

    name = "gcvit (GC ViT)"
    models = (GlobalContextVit,)
    blocks = (GlobalContextVitBlock,)
    hosts: ClassVar[Hosts] = {WindowAttentionGlobal: LocalHost}
    whole: ClassVar[Blocks] = {GlobalContextVitBlock: WholeContextBlock}
    gives_up = ("bias",)

    def paths(self, model: nn.Module) -> list[list[str]]:
        return [
            [path for path in stage if not self._is_global(model, path)] for stage in super().paths(model)
        ]

    def _is_global(self, model: nn.Module, path: str) -> bool:
        return bool(getattr(attention_of(submodule(model, path)), "use_global", False))

    def image_size(self, model: Any) -> tuple[int, int] | None:
        height, width = model.stages[0].feat_size
        return 4 * height, 4 * width

    def channels(self, model: Any) -> int:
        return int(model.stem.conv1.in_channels)

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        found, (height, width) = [], (-(-size[0] // 4), -(-size[1] // 4))
        for _ in self.recomputed(model):
            found.append(Geometry(0, (height, width)))
            height, width = -(-height // 2), -(-width // 2)
        return found

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        """Scale the windows with the images, as timm's constructor does, and resample their biases."""
        old: Any = self.image_size(model)
        for stage, geometry in zip(self.recomputed(model), self.geometries(model, size), strict=True):
            blocks: Any = submodule(stage, "blocks")
            for block in blocks:
                sides = list(zip(size, block.window_size, old, strict=True))
                if any(new * side % before for new, side, before in sides):
                    raise ValueError("its images are not whole windows")
                set_window(block, "window_size", tuple(new * side // before for new, side, before in sides))
            stage.feat_size = geometry.grid  # type: ignore[assignment]

    def attention_input(self, block: nn.Module) -> None:
        return None  # it gets queries of the whole image, too

    def initialize(self, model: nn.Module) -> None:
        reset(model)


def reset(model: nn.Module) -> None:
    """Initialize every weight as its module does."""
    for module in model.modules():
        own: Any = getattr(module, "reset_parameters", None)
        if own is not None:
            own()


def set_window(block: Any, name: str, window: Size) -> None:
    """Set the windows of a block, whose attribute `name` they are, and its bias unless it was converted."""
    layer = attention_of(block)
    for each in (block, *getattr(layer, "_block", ())):
        setattr(each, name, window)
    rel_pos = layer._modules.get("rel_pos")
    if rel_pos is not None and not getattr(layer, "permanent", False):
        rel_pos.set_window_size(window)


# MaxViT: after a convolution, windows and then grids of tokens that are spread over the whole.


class PartitionHost(LocalHost):
    """MaxViT: natively, softmax within windows or within spread grids, with a relative position bias."""

    @property
    def cuts_rows(self) -> bool:  # type: ignore[override]
        """Whether q, k and v are not side by side in each head."""
        return not getattr(self.original, "head_first", False)

    def windows(self, grid: Size) -> Windows:
        [block] = self._block
        size: Any = block.partition_size
        return Windows(grid, tuple(size), spread=not block.partition_block)

    def window_bias(self, windows: Windows, like: Tensor) -> Tensor | None:  # type: ignore[override]
        return super().window_bias(windows, like) if self.has_bias else None

    def parts(self, x_BNC: Tensor, grid: Size) -> dict[str, Tensor]:
        if self.cuts_rows:
            return super().parts(x_BNC, grid)
        by_head = self._project(x_BNC).unflatten(2, (self.num_heads, 3, -1))
        return {part: x.flatten(2) for part, x in zip(QKV, by_head.unbind(3), strict=True)}


class WholePartition(PartitionAttentionCl):
    """timm's block of MaxViT whose attention gets the whole grid (B, height, width, C) instead of windows or grids."""

    def _partition_attn(self, x: Tensor) -> Any:
        return self.attn(x)

    def set_partition_size(self, partition_size: Size) -> None:
        """Change the windows; a converted layer has none."""
        rows, columns = partition_size
        set_window(self, "partition_size", (rows, columns))


class MaxViT(OneSize):
    """timm's `maxvit_*` whose blocks are windows and grids in turn: two sites each. Windows are a part of the image."""

    name = "maxxvit (MaxViT)"
    models = (MaxxVit,)
    blocks = (PartitionAttentionCl,)
    hosts: ClassVar[Hosts] = {AttentionCl: PartitionHost}
    whole: ClassVar[Blocks] = {PartitionAttentionCl: WholePartition}
    gives_up = ("bias",)

    def paths(self, model: nn.Module) -> list[list[str]]:
        kinds = (PartitionAttentionCl, PartitionAttention2d, TransformerBlock2d, ParallelPartitionAttention)
        found = [
            [name for name, part in stage.named_modules(prefix=f"stages.{i}") if isinstance(part, kinds)]
            for i, stage in enumerate(self.recomputed(model))
        ]
        return [stage for stage in found if stage]

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        return size_of(model)

    def channels(self, model: Any) -> int:
        return int(model.stem.conv1.in_channels)

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        first = len(self.recomputed(model)) - len(self.paths(model))  # stages of convolutions come first
        found, (height, width) = [], (-(-size[0] // 2), -(-size[1] // 2))
        for _ in self.recomputed(model):
            height, width = -(-height // 2), -(-width // 2)
            found.append(Geometry(0, (height, width)))
        return found[first:]

    def resize(self, model: Any, size: tuple[int, int]) -> None:
        """Scale the windows with the images, as timm's constructor does, and resample their biases."""
        if any(side % model.partition_ratio for side in size):
            raise ValueError(f"the sides of its images are multiples of {model.partition_ratio}")
        given = getattr(model, "_model_args", {})
        model.set_input_size(img_size=size)
        model._model_args = {**given, "img_size": size}  # timm notes windows, which follow from the size

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return submodule(model, "norm")

    def initialize(self, model: nn.Module) -> None:
        reset(model)


FAMILIES = (Davit(), NesT(), GCViT(), MaxViT())
