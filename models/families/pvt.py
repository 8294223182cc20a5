"""PVTv2 (arXiv:2106.13797) and PVT (arXiv:2102.12122): stages of blocks with spatially reduced keys and values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from timm.layers import (
    DropPath,
    Mlp,
    calculate_drop_path_rates,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.pvt_v2 import Attention, Block, PyramidVisionTransformerV2
from timm.models.pvt_v2 import MlpWithDepthwiseConv as MlpWithDepthwiseConv
from torch import Tensor, nn

from ..attention.base import Geometry
from ..errors import ConfigError
from ..host import ReducedHost
from ..map_structure import resample_plainly
from .site import AnySize, Family, Hosts, merged_grid, size_of, submodule, vit

# PVT, which timm does not have: each stage has its own learned positions, the last one a class token.
#
# Attention layers and names are those of timm's PVTv2: `patch_embed`, `stages.i.downsample`, `stages.i.blocks.j`. Shape
# suffixes: B batch, C channels, H and W the grid, N tokens.

Size = tuple[int, int]
Resampling = Literal["timm", "bilinear"]
"""How learned positions are resampled: timm's antialiased bicubic, or plain bilinear as published."""
EPSILON = 1e-6
"""Of the norms in and after the blocks; those of patch embeddings have torch's own, 1e-5."""


class PatchEmbedding(nn.Module):
    """Join patches that do not overlap by a convolution, then normalize: (B, C, H, W) to (B, h, w, C')."""

    img_size: Size | None = None
    """The size of the images, of the first embedding of a model."""
    strict_img_size = False

    def __init__(self, in_chans: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.proj = nn.Conv2d(in_chans, width, patch_size, patch_size)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(self.proj(x_BCHW).permute(0, 2, 3, 1))


class ResidualBlock(nn.Module):
    """Attention of a kind, then an MLP; both after a norm and beside a residual path."""

    kind: ClassVar[type[nn.Module]]
    epsilon = 1e-5

    def __init__(
        self, width: int, num_heads: int, reach: int, mlp_ratio: float, drop_path: float, **more: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, self.epsilon)
        self.attn = self.kind(width, num_heads, reach, **more)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(width, self.epsilon)
        self.mlp = Mlp(width, int(width * mlp_ratio), drop=more.get("proj_drop", 0.0))
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x_BNC: Tensor, grid: Size) -> Tensor:
        x_BNC = x_BNC + self.drop_path1(self.attn(self.norm1(x_BNC), grid))
        return x_BNC + self.drop_path2(self.mlp(self.norm2(x_BNC)))


class PVTBlock(ResidualBlock):
    """A block whose attention has reduced keys and values."""

    kind = Attention
    epsilon = EPSILON


class PVTStage(nn.Module):
    """A patch embedding (none in the first stage), learned positions, and blocks."""

    grad_checkpointing = False
    resampling: Resampling = "timm"

    def __init__(
        self,
        embedding: nn.Module | None,
        blocks: Sequence[nn.Module],
        grid: Size,
        width: int,
        has_class: bool,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.downsample = embedding
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if has_class else None
        self.pos_embed = nn.Parameter(torch.zeros(1, has_class + grid[0] * grid[1], width))
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(blocks)

    @property
    def num_prefix(self) -> int:
        """Return the number of tokens before the grid: 1 with a class token, else 0."""
        return 0 if self.cls_token is None else 1

    def positions(self, grid: Size) -> Tensor:
        """Return the learned positions (1, N, C), resampled for another grid than the stage's own."""
        if grid == self.grid:
            return self.pos_embed
        if self.resampling == "bilinear":
            return resample_plainly(self.pos_embed, grid, self.grid, self.num_prefix, "bilinear")
        return resample_abs_pos_embed(
            self.pos_embed, list(grid), list(self.grid), num_prefix_tokens=self.num_prefix
        )

    def set_grid(self, grid: Size) -> None:
        """Resample the learned positions for good."""
        self.pos_embed = nn.Parameter(self.positions(grid).detach())
        self.grid = grid

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """Return the tokens (B, N, C) and their grid, from (B, C, H, W), or (B, H, W, C) in the first stage."""
        x_BHWC = x if self.downsample is None else self.downsample(x)
        grid = (x_BHWC.shape[1], x_BHWC.shape[2])
        x_BNC = x_BHWC.flatten(1, 2)
        if self.cls_token is not None:
            x_BNC = torch.cat([self.cls_token.expand(x_BNC.shape[0], -1, -1).to(x_BNC.dtype), x_BNC], 1)
        x_BNC = self.pos_drop(x_BNC + self.positions(grid))
        for block in self.blocks:
            x_BNC = checkpoint(block, x_BNC, grid) if self.grad_checkpointing else block(x_BNC, grid)
        return x_BNC, grid


class Pyramid(nn.Module, ABC):
    """What our pyramids share: the interface of timm's models, over stages one after another."""

    num_features: int
    norm: nn.Module
    head_drop: nn.Module
    head: nn.Module
    num_classes: int
    global_pool: str

    @abstractmethod
    def stage_list(self) -> list[Any]:
        """Return the stages in order."""

    @abstractmethod
    def run_stage(self, i: int, x: Tensor) -> tuple[Tensor, Size]:
        """Return the tokens of stage `i` and their grid, from the images or the map of the stage before."""

    def as_map(self, i: int, x_BNC: Tensor, grid: Size) -> Tensor:
        """Return the tokens of the grid of stage `i` as (B, C, H, W)."""
        return x_BNC.transpose(1, 2).unflatten(2, grid)

    @abstractmethod
    def drop_stages(self, first: int) -> None:
        """Drop the stages from `first` on."""

    def init_weights(self) -> None:
        """Initialize as published: truncated normal of 0.02 for linear layers, torch's own start for convolutions."""
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping its activations."""
        for stage in self.stage_list():
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the classifier layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier. Raises ConfigError: another `global_pool`, which is chosen with the model."""
        if global_pool not in (None, self.global_pool):
            raise ConfigError(f"global_pool={global_pool!r}; this model was built with {self.global_pool}")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the tokens after the last norm, and the maps (B, C, H, W) of the stages `indices`, as timm does.

        Raises ConfigError: an `output_fmt` other than "NCHW".
        """
        if output_fmt != "NCHW":
            raise ConfigError(f"output_fmt={output_fmt!r}; valid is NCHW")
        depth = len(self.stage_list())
        wanted, last = feature_take_indices(depth, indices)
        maps, tokens = [], x
        for i in range(last + 1 if stop_early else depth):
            tokens, grid = self.run_stage(i, x)
            x = self.as_map(i, tokens, grid)
            if i in wanted:
                maps.append(self.as_map(i, self.norm(tokens), grid) if norm and i == depth - 1 else x)
        return maps if intermediates_only else (self.norm(tokens), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and the parts that are not needed, as timm does."""
        depth = len(self.stage_list())
        wanted, last = feature_take_indices(depth, indices)
        ends = last < depth - 1
        self.drop_stages(last + 1)
        if prune_norm or ends:
            self.norm = nn.Identity()
        if prune_head or ends:
            self.reset_classifier(0)
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the tokens (B, N, C) of the last stage after the last norm."""
        tokens, grid = self.run_stage(0, x)
        for i in range(1, len(self.stage_list())):
            tokens, grid = self.run_stage(i, self.as_map(i - 1, tokens, grid))
        return self.norm(tokens)

    def forward_head(self, x_BNC: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (B, classes), or the pooled features (B, C)."""
        pooled = self.head_drop(x_BNC[:, 0] if self.global_pool == "token" else x_BNC.mean(1))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, 3, H, W)."""
        return self.forward_head(self.forward_features(x))


class PVT(Pyramid):
    """The Pyramid Vision Transformer, with the interface of timm's models.

    `global_pool` is "token" (the class token of the last stage) or "avg" (no class token, the mean of the grid).
    `resampling` is how learned positions are resampled for images of another size.

    Raises ConfigError: an unknown `global_pool` or `resampling`, reduced keys in a stage with a class token, or
    settings for different numbers of stages.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | Size = 224,
        patch_size: int = 4,
        global_pool: Literal["token", "avg"] = "token",
        depths: Sequence[int] = (3, 4, 6, 3),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        resampling: Resampling = "timm",
    ) -> None:
        super().__init__()
        if global_pool not in ("token", "avg"):
            raise ConfigError(f"global_pool={global_pool!r}; valid are token and avg")
        if resampling not in ("timm", "bilinear"):
            raise ConfigError(f"resampling={resampling!r}; valid are timm and bilinear")
        if global_pool == "token" and sr_ratios[-1] != 1:
            raise ConfigError(
                f"sr_ratios={tuple(sr_ratios)}: the last stage has a class token, which a reduction has no place for; "
                "give 1, or global_pool=avg"
            )
        check_stages(
            depths=depths,
            embed_dims=embed_dims,
            num_heads=num_heads,
            sr_ratios=sr_ratios,
            mlp_ratios=mlp_ratios,
        )
        self.num_classes, self.global_pool = num_classes, global_pool
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.patch_embed = PatchEmbedding(in_chans, embed_dims[0], patch_size)
        self.patch_embed.img_size = to_2tuple(img_size)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages, grid = [], self._first_grid()
        for i, (width, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            more = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
            blocks = [
                PVTBlock(width, num_heads[i], sr_ratios[i], mlp_ratios[i], rates[i][j], **more)
                for j in range(depth)
            ]
            embedding = PatchEmbedding(embed_dims[i - 1], width, 2) if i else None
            grid = (grid[0] // 2, grid[1] // 2) if i else grid
            last = i == len(depths) - 1
            stages.append(PVTStage(embedding, blocks, grid, width, last and global_pool == "token"))
            stages[-1].pos_drop.p = pos_drop_rate
        self.stages = nn.ModuleList(stages)
        self.set_resampling(resampling)
        self.feature_info = [
            {"num_chs": width, "reduction": patch_size * 2**i, "module": f"stages.{i}"}
            for i, width in enumerate(embed_dims)
        ]
        self.norm = nn.LayerNorm(embed_dims[-1], EPSILON)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dims[-1], num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()

    @property
    def num_prefix_tokens(self) -> int:
        """Return the number of prefix tokens of the last stage."""
        return self.stage_list()[-1].num_prefix

    def init_weights(self) -> None:
        super().init_weights()
        for stage in self.stage_list():
            trunc_normal_(stage.pos_embed, std=0.02)
            if stage.cls_token is not None:
                trunc_normal_(stage.cls_token, std=0.02)

    def set_resampling(self, resampling: Resampling) -> None:
        """Choose how positions are resampled, in a call and for good."""
        for stage in self.stage_list():
            stage.resampling = resampling

    def set_input_size(self, img_size: int | Size) -> None:
        """Resample the learned positions for images of another size."""
        self.patch_embed.img_size = to_2tuple(img_size)
        grid = self._first_grid()
        for stage in self.stage_list():
            if stage.downsample is not None:
                grid = (grid[0] // 2, grid[1] // 2)
            stage.set_grid(grid)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay: the class token, as published."""
        return {f"stages.{i}.cls_token" for i, stage in enumerate(self.stage_list()) if stage.num_prefix}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns of timm's layer groups: stages, or blocks."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)"}
        blocks = [
            (r"^stages\.(\d+)\.(?:downsample|pos_embed|cls_token)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99_999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def run_stage(self, i: int, x: Tensor) -> tuple[Tensor, Size]:
        return self.stage_list()[i](x if i else self.patch_embed(x))

    def as_map(self, i: int, x_BNC: Tensor, grid: Size) -> Tensor:
        return super().as_map(i, x_BNC[:, self.stage_list()[i].num_prefix :], grid)

    def drop_stages(self, first: int) -> None:
        self.stages = self.stages[:first]

    def _first_grid(self) -> Size:
        height, width = cast(Size, self.patch_embed.img_size)
        rows, columns = self.patch_embed.patch_size
        return height // rows, width // columns

    def stage_list(self) -> list[PVTStage]:
        return cast("list[PVTStage]", list(self.stages))


def check_stages(**settings: Sequence[float]) -> None:
    """Raise ConfigError unless each of `settings` has one value for each stage."""
    (first, *_), lengths = settings, {name: len(values) for name, values in settings.items()}
    for name, length in lengths.items():
        if length != lengths[first]:
            raise ConfigError(
                f"{name} has values for {length} stages, and {first} for {lengths[first]}: give one for each stage"
            )


class PVTv2(AnySize):
    """timm's `pvt_v2_*`. They take images of any size, so their constructor has no size."""

    name = "pvt_v2 (PVTv2)"
    models: tuple[type[nn.Module], ...] = (PyramidVisionTransformerV2,)
    blocks: tuple[type[nn.Module], ...] = (Block,)
    hosts: ClassVar[Hosts] = {Attention: ReducedHost}

    def merges(self, model: nn.Module) -> list[str]:
        stages: Any = model.stages
        return [f"stages.{i}.downsample" for i in range(1, len(stages))]

    def known_size(self, model: Any) -> tuple[int, int] | None:
        return size_of(model.patch_embed) or size_of(model)

    def geometries(self, model: Any, size: tuple[int, int]) -> list[Geometry]:
        embeddings = [stage.downsample or model.patch_embed for stage in model.stages]
        found, grid = [], size
        for embedding in embeddings:
            grid = merged_grid(embedding, grid)
            found.append(Geometry(0, grid))
        return found

    def with_blocks(self, model: nn.Module, blocks: Sequence[nn.Module], *, cut: bool) -> nn.Module:
        twin: Any = super().with_blocks(model, blocks, cut=cut)
        last = list(twin.stages)[-1]
        if cut and "norm" in last._modules:
            last._modules["norm"] = nn.Identity()
        return twin


class PVTv1(PVTv2):
    """Our `pvt_*`: positions are learned for one size of the images, and the last stage has a class token."""

    name = "pvt (PVT)"
    models = (PVT,)
    blocks = (PVTBlock,)
    sized_when_built = True

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        size = vit(model).patch_embed.img_size
        return int(size[0]), int(size[1])

    def patch_size(self, model: nn.Module) -> tuple[int, int]:
        return Family.patch_size(self, model)

    def geometries(self, model: Any, size: tuple[int, int]) -> list[Geometry]:
        found = super().geometries(model, size)
        return [
            Geometry(stage.num_prefix, each.grid) for stage, each in zip(model.stages, found, strict=True)
        ]

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        vit(model).set_input_size(img_size=size)

    def last_tokens(self, model: nn.Module) -> nn.Module:
        return submodule(model, "norm")

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return Family.patches(self, tokens, geometry)


FAMILIES = (PVTv2(), PVTv1())
