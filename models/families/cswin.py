"""CSwin: stripes of the grid, columns in half of the heads and rows in the others (arXiv:2107.00652).

timm does not have the model. Names are the published ones, with `attn.` before the parts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from timm.layers import calculate_drop_path_rates, to_2tuple
from timm.models import checkpoint
from torch import Tensor, nn

from ..attention.base import Geometry, Heads
from ..attention.softmax import Softmax
from ..attention.stripes import LePE, Stripes, cross, stripe_positions, stripe_softmax
from ..errors import ConfigError
from ..host import GridHost
from ..map_structure import MapStructure, Size
from .pvt import Pyramid, ResidualBlock, check_stages
from .site import Family, Hosts, merged_grid, shallow, submodule, vit
from .twins import TwinsMerging

# The parts of CSwin. Shape suffixes: B batch, C channels, H and W the grid, N tokens, D head width.


class CSwinAttention(nn.Module):
    """Softmax attention within stripes, with LePE; `split` is the width of a stripe, 0 for the whole map."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        split: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.split, self.scale = num_heads, split, (width // num_heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        branches = 2 if split else 1
        self.attns = nn.ModuleList(LePE(width // branches) for _ in range(branches))
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_drop)

    def stripes(self, grid: Size) -> list[Stripes]:
        """Return the stripes of each equal part of the heads."""
        return cross(grid, self.split) if self.split else [Stripes(grid, grid)]

    def forward(self, x_BNC: Tensor, grid: Size) -> Tensor:
        q, k, v = self.qkv(x_BNC).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop.p if self.training else 0.0
        heads, stripes = Heads(q, k, v, None, self.scale, dropout, Geometry(0, grid)), self.stripes(grid)
        convolutions = cast("list[LePE]", list(self.attns))
        out_BHND = stripe_softmax(heads, stripes) + stripe_positions(convolutions, v, stripes)
        return self.proj_drop(self.proj(out_BHND.transpose(1, 2).flatten(2)))


class CSwinBlock(ResidualBlock):
    """A block whose attention is within stripes."""

    kind = CSwinAttention


class Stage(nn.ModuleList):
    """The blocks of a stage, which run on tokens (B, N, C) and their grid."""

    grad_checkpointing = False

    def forward(self, x_BNC: Tensor, grid: Size) -> Tensor:
        for block in self.__dict__.get("blocks", self):  # `replay.py` puts callables there
            x_BNC = checkpoint(block, x_BNC, grid) if self.grad_checkpointing else block(x_BNC, grid)
        return x_BNC


class Embedding(nn.Module):
    """A convolution with overlap, then a norm: (B, C, H, W) to tokens (B, N, C') and their grid.

    `names` are those of the two parts: the stem is published as a sequence, a merge with names.
    """

    def __init__(self, proj: nn.Conv2d, names: tuple[str, str] = ("conv", "norm")) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], proj)
        self.add_module(names[1], nn.LayerNorm(proj.out_channels))

    @property
    def proj(self) -> nn.Conv2d:
        """Return the convolution."""
        return cast(nn.Conv2d, self._modules[self.names[0]])

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Size]:
        x_BCHW = self.proj(x_BCHW)
        norm = cast(nn.LayerNorm, self._modules[self.names[1]])
        return norm(x_BCHW.flatten(2).transpose(1, 2)), (x_BCHW.shape[2], x_BCHW.shape[3])


class Stem(Embedding):
    """The first embedding: patches of 7 x 7 pixels, four apart."""

    patch_size = (4, 4)
    strict_img_size = False

    def __init__(self, in_chans: int, width: int, img_size: Size) -> None:
        super().__init__(nn.Conv2d(in_chans, width, 7, 4, 2), ("0", "2"))
        self.img_size = img_size


class CSwin(Pyramid):
    """The CSwin Transformer, with the interface of timm's models; images may have any size.

    `split_size` are the widths of the stripes by stage, 0 for the whole map. The last stage sees the whole map, as does
    a stage whose stripes are as wide as its grid at `img_size`: such a stage has one branch over all heads.

    Raises ConfigError: settings for different numbers of stages, heads that do not divide a width in two halves, or a
    `global_pool` other than "avg".
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | Size = 224,
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 2, 21, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_size: Sequence[int] = (1, 2, 7, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if global_pool != "avg":
            raise ConfigError(f"global_pool={global_pool!r}; valid is avg: CSwin has no class token")
        check_stages(depths=depths, num_heads=num_heads, split_size=split_size)
        self.num_classes, self.global_pool = num_classes, global_pool
        self.depth, self.split_size = len(depths), list[int]()
        self.num_features = self.head_hidden_size = embed_dim << (self.depth - 1)
        size = to_2tuple(img_size)
        self.stage1_conv_embed = Stem(in_chans, embed_dim, (int(size[0]), int(size[1])))
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        more = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        grid = stem_grid(size)
        self.feature_info = []
        for i, depth in enumerate(depths):
            width = embed_dim << i
            if i:
                self.add_module(f"merge{i}", Embedding(nn.Conv2d(width // 2, width, 3, 2, 1)))
                grid = (-(-grid[0] // 2), -(-grid[1] // 2))
            whole = i == self.depth - 1 or split_size[i] == 0 or grid == (split_size[i], split_size[i])
            _check_heads(i, width, num_heads[i], 1 if whole else 2)
            split = 0 if whole else split_size[i]
            self.split_size.append(split)
            blocks = [
                CSwinBlock(width, num_heads[i], split, mlp_ratio, rates[i][j], **more) for j in range(depth)
            ]
            self.add_module(f"stage{i + 1}", Stage(blocks))
            self.feature_info.append({"num_chs": width, "reduction": 4 << i, "module": f"stage{i + 1}"})
        self.norm = nn.LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()

    @property
    def patch_embed(self) -> Stem:
        """Return the stem, by timm's name."""
        return self.stage1_conv_embed

    def stage_list(self) -> list[Stage]:
        return [cast(Stage, self._modules[f"stage{i + 1}"]) for i in range(self.depth)]

    def set_input_size(self, img_size: int | Size) -> None:
        """Expect images of another size; stripes keep their width, and no tensor changes."""
        size = to_2tuple(img_size)
        self.stage1_conv_embed.img_size = (int(size[0]), int(size[1]))

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay: none beside biases and norms."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns of timm's layer groups: stages, or blocks."""
        if coarse:
            return {"stem": r"^stage1_conv_embed", "blocks": r"^(?:stage|merge)(\d+)\."}
        blocks = [
            (r"^stage(\d+)\.(\d+)\.", None),
            (r"^merge(\d+)\.", (99_999,)),
            (r"^norm", (99_999,)),
        ]
        return {"stem": r"^stage1_conv_embed", "blocks": blocks}

    def drop_stages(self, first: int) -> None:
        for i in range(first, self.depth):
            del self._modules[f"stage{i + 1}"], self._modules[f"merge{i}"]
        self.depth = first

    def run_stage(self, i: int, x: Tensor) -> tuple[Tensor, Size]:
        embedding = self._modules[f"merge{i}" if i else "stage1_conv_embed"]
        x_BNC, grid = cast(Embedding, embedding)(x)
        return self.stage_list()[i](x_BNC, grid), grid


def stem_grid(size: Size) -> Size:
    """Return the rows and columns of tokens after the stem."""
    return (size[0] - 3) // 4 + 1, (size[1] - 3) // 4 + 1


def _check_heads(stage: int, width: int, heads: int, branches: int) -> None:
    """Raise ConfigError unless the heads divide the width, and each branch has as many of them."""
    if width % heads or heads % branches:
        words = "an even number of them" if branches == 2 else "a divisor"
        raise ConfigError(
            f"num_heads={heads} of stage {stage + 1} does not fit its width {width}: give {words}"
        )


# CSwin as a family: its host, and the walk through its blocks.

OUTSIDE = -1e4
"""What is added to the logits of pairs that do not meet: their weight is zero, and a finite number times zero is zero.
It is within the range of half precision."""


class StripeHost(GridHost):
    """CSwin: natively, softmax within stripes. LePE is added natively within stripes, after a conversion to the map."""

    reads = ("v",)

    def stripes(self, grid: Size) -> list[Stripes]:
        """Return the native stripes of each equal part of the heads."""
        return self.original.stripes(grid)

    def attend(self, heads: Heads) -> Tensor:
        if self.is_native and isinstance(self.operator, Softmax):
            return stripe_softmax(heads, self.stripes(heads.tokens().grid))
        return super().attend(heads)

    def attended(self, heads: Heads) -> Heads:
        """Return the projections with a bias of all pairs of tokens, `OUTSIDE` where they do not meet.

        Padded stripes add one key and one value of zeros. Its bias is the logarithm of the number of padded tokens
        that a query sees, so it has their weight in the softmax.
        """
        grid = heads.tokens().grid
        stripes = self.stripes(grid)
        if not self._stripe:
            return heads
        bias = torch.stack([self._meeting(cut, heads) for cut in stripes])
        bias_1HNM = bias.repeat_interleave(self.num_heads // len(stripes), 0).unsqueeze(0)
        more = (0, 0, 0, bias_1HNM.shape[3] - grid[0] * grid[1])
        k, v = (None if x is None else nn.functional.pad(x, more) for x in (heads.k, heads.v))
        return Heads(heads.q, k, v, bias_1HNM, heads.scale, heads.dropout, heads.geometry)

    def with_local(self, out_BHND: Tensor, heads: Heads) -> Tensor:
        grid = heads.tokens().grid
        convolutions = cast("list[LePE]", list(cast(nn.ModuleList, self.attns)))
        stripes = self.stripes(grid) if self.is_native else [Stripes(grid, grid)] * len(convolutions)
        return out_BHND + stripe_positions(convolutions, heads.values(), stripes)

    def structure(self, grid: Size) -> MapStructure:
        if not self._stripe:
            return MapStructure()
        padded = any(cut.is_padded for cut in self.stripes(grid))
        return MapStructure(stripes=self._stripe, padded=padded)

    def all_pairs(self, geometry: Geometry) -> int:
        stripes = self.stripes(geometry.grid)
        return self.num_heads // len(stripes) * sum(cut.pairs for cut in stripes)

    def has_whole_map(self, geometry: Geometry) -> bool:
        return not self._stripe

    @property
    def _stripe(self) -> int:
        return int(self.original.split)

    def _meeting(self, cut: Stripes, heads: Heads) -> Tensor:
        """Return the bias of the stripes of one kind, (N, N), or (N, N + 1) if stripes of the layer are padded."""
        like, grid = heads.known, heads.tokens().grid
        numbers = torch.arange(
            cut.padded[0] * cut.padded[1] // (cut.size[0] * cut.size[1]), device=like.device
        )
        of_token = cut.join(
            numbers[:, None, None, None].expand(-1, 1, cut.size[0] * cut.size[1], 1)
        ).flatten()
        meets = of_token[:, None] == of_token
        bias = like.new_full(meets.shape, OUTSIDE).masked_fill(meets, 0.0)
        if not any(each.is_padded for each in self.stripes(grid)):
            return bias
        more = cut.size[0] * cut.size[1] - meets.sum(1, keepdim=True)
        column = like.new_tensor(1.0) * more
        return torch.cat([bias, torch.where(more > 0, column.clamp_min(1).log(), OUTSIDE)], 1).to(like.dtype)


class CSwinFamily(Family):
    """Our `cswin_*`: images have any size, and stripes keep their width."""

    name = "cswin (CSwin)"
    models = (CSwin,)
    blocks = (CSwinBlock,)
    hosts: ClassVar[Hosts] = {CSwinAttention: StripeHost}
    merging = TwinsMerging

    def paths(self, model: nn.Module) -> list[list[str]]:
        stages = cast(CSwin, model).stage_list()
        return [[f"stage{i}.{j}" for j in range(len(stage))] for i, stage in enumerate(stages, 1)]

    def merges(self, model: nn.Module) -> list[str]:
        return [f"merge{i}" for i in range(1, cast(CSwin, model).depth)]

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        return cast(CSwin, model).patch_embed.img_size

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        found, grid = [], size
        for path in ("stage1_conv_embed", *self.merges(model)):
            grid = merged_grid(submodule(model, path), grid)
            found.append(Geometry(0, grid))
        return found

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        vit(model).set_input_size(img_size=size)

    def size_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Return the size with the widths of stripes, which say what is the whole map where the size does not."""
        return {"img_size": self.image_size(model), "split_size": cast(CSwin, model).split_size}

    def with_blocks(self, model: nn.Module, blocks: Sequence[nn.Module], *, cut: bool) -> nn.Module:
        twin: Any = shallow(model)
        stages = self.by_stage(model, blocks)
        for i, own in enumerate(stages, 1):
            stage = shallow(submodule(model, f"stage{i}"))
            stage._modules = {str(j): block for j, block in enumerate(own)}
            twin._modules[f"stage{i}"] = stage
        twin.depth = len(stages)
        return cast(nn.Module, twin)

    def embedding(self, model: nn.Module) -> nn.Module:
        return submodule(model, "stage1_conv_embed")

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return [*cast(CSwin, model).stage_list()]


FAMILIES = (CSwinFamily(),)
