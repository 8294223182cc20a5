"""Plain vision transformers: one list of blocks, which all have the same tokens, heads and widths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from timm.layers import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.twins import Twins
from timm.models.vision_transformer import Block as PlainBlock
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

from ..attention.base import Geometry
from ..errors import UnsupportedModelError
from .site import Block, Family, listed, shallow, submodule, vit

MODELS = (VisionTransformer, Beit, Eva)
BLOCKS = (PlainBlock, ResPostBlock, BeitBlock, EvaBlock, EvaBlockPostNorm)
ATTENTIONS = (Attention, AttentionRope, BeitAttention, EvaAttention)
ANY_SIZE = (PyramidVisionTransformerV2, Twins)
"""timm's models that take images of any size, and get the attribute `img_size` when they are resized."""
SUPPORTED = (
    "timm's plain vision transformers: vision_transformer (ViT, DeiT III, MAE, DINO, DINOv2, CLIP, SigLIP), "
    "deit, beit (BEiT, BEiTv2) and eva (EVA, EVA-02, DINOv3)"
)


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of a sequence: prefix tokens by kind, then the patch grid, row by row."""

    prefix: tuple[str, ...]
    grid: tuple[int, int]

    @property
    def num_prefix(self) -> int:
        return len(self.prefix)

    @property
    def num_tokens(self) -> int:
        return self.geometry.num_tokens

    @property
    def geometry(self) -> Geometry:
        """Return the layout without the kinds of prefix tokens."""
        return Geometry(self.num_prefix, self.grid)


@dataclass(frozen=True)
class AttentionShape:
    """Depth, heads and widths of a model's attention layers."""

    depth: int
    num_heads: int
    head_dim: int
    width: int


def is_supported(model: nn.Module) -> bool:
    """Return whether an adapter covers the model, so that its attention layers can be read."""
    return isinstance(model, MODELS)


def refuse_copied(model: nn.Module, copied: bool) -> None:
    """Raise UnsupportedModelError for a model that copies its teacher's attention, unless `copied`."""
    if not copied and hasattr(model, "copied"):
        raise UnsupportedModelError(
            f"this {type(model).__name__} runs with its teacher's attention and has none of its own to convert, teach "
            "or learn from: take its teacher, a student that was trained by distilling, or its own weights alone "
            "(`graftvit checkpoint save SOURCE DIR --bare`)"
        )


def attention_blocks(model: nn.Module) -> list[Block]:
    """Return the blocks of a plain transformer in order; an empty list for a model without such blocks."""
    if isinstance(model, Twins):  # its `blocks` are lists of blocks, one for each stage
        return []
    own = model._modules.get("blocks")  # not the callables of `replay.py`
    return list(getattr(model, "blocks", ()) if own is None else cast(Iterable[Block], own))


def classifier_of(model: nn.Module) -> nn.Module | None:
    """Return the classifier layer, or None."""
    found = vit(model).get_classifier() if hasattr(model, "get_classifier") else None
    return found if isinstance(found, nn.Module) else None


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the height and width of the images that a model was built for; None if unknown.

    A pyramid that takes images of any size has a size once it was resized or converted.
    """
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None and isinstance(model, ANY_SIZE):
        size = getattr(model, "img_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Return the height and width of a patch; one pixel if unknown, or if patches overlap, which fill any image."""
    if isinstance(model, PyramidVisionTransformerV2):
        return 1, 1
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None) or (1, 1)
    return int(size[0]), int(size[1])


def pooling_of(model: nn.Module) -> str | None:
    """Return the pooling before a model's head in timm's word, "" for none; None for a model that does not say it."""
    pooling = getattr(model, "global_pool", None)
    return pooling if isinstance(pooling, str) else None


def image_channels(model: nn.Module) -> int:
    """Return the channels of the images that a model takes."""
    several: Any = getattr(model, "patch_embeds", None)  # Twins has one for each stage
    embedding = vit(model).patch_embed if several is None else several[0]
    return int(embedding.proj.in_channels)


def has_relative_bias(model: nn.Module) -> bool:
    """Return whether the model adds a relative position bias, tied to its grid, to its attention logits."""
    return getattr(model, "rel_pos_bias", None) is not None or any(
        getattr(getattr(block, "attn", None), "relative_position_bias_table", None) is not None
        for block in attention_blocks(model)
    )


def token_layout(model: nn.Module) -> TokenLayout:
    """Return the tokens of a model's sequence: ("cls", "dist", "reg0", …) and the patch grid (height, width).

    The grid is that of the model's image size; with `dynamic_img_size`, other sizes have other grids.
    """
    _check_plain(model)
    size = image_size(model)
    if size is None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} was built without an image size, so its number of patches is unknown: "
            "build it with img_size"
        )
    return TokenLayout(prefix_kinds(model), patch_grid(vit(model).patch_embed, size))


def prefix_kinds(model: nn.Module) -> tuple[str, ...]:
    """Return the kinds of prefix tokens: "cls", "dist", "reg0", …"""
    registers = getattr(model, "reg_token", None)
    prefix = ["cls"] if vit(model).cls_token is not None else []
    if getattr(model, "dist_token", None) is not None:
        prefix.append("dist")
    prefix += [f"reg{index}" for index in range(0 if registers is None else registers.shape[1])]
    return tuple(prefix)


def patch_grid(embedding: Any, images: tuple[int, int]) -> tuple[int, int]:
    """Return the patches (rows, columns) of images (height, width). Remaining pixels are dropped or padded."""
    height, width = embedding.dynamic_feat_size(images)
    return int(height), int(width)


def fills(embedding: Any, images: tuple[int, int]) -> bool:
    """Return whether whole patches fill images of this size (height, width).

    An embedding that pads takes every size. One of a fixed size takes only its own, and ignores remaining pixels.
    """
    if getattr(embedding, "strict_img_size", True) or getattr(embedding, "dynamic_img_pad", True):
        return True
    patch = embedding.patch_size
    return images[0] % int(patch[0]) == 0 and images[1] % int(patch[1]) == 0


def attention_shape(model: nn.Module) -> AttentionShape:
    """Return depth, heads, head width and model width, read from the first block (all blocks are alike).

    Raises UnsupportedModelError: the model is no plain vision transformer.
    """
    _check_plain(model)
    blocks = attention_blocks(model)
    attention = blocks[0].attn
    width = attention.proj.in_features
    return AttentionShape(
        len(blocks), attention.num_heads, width // attention.num_heads, attention.proj.out_features
    )


def _check_plain(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model whose layers are not all alike, such as a pyramid."""
    blocks = attention_blocks(model)
    if not blocks or not hasattr(blocks[0], "attn") or not hasattr(model, "cls_token"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no single list of equal attention layers, as is needed here; supported are "
            f"{SUPPORTED}"
        )


class Plain(Family):
    """timm's plain vision transformers, as `SUPPORTED` lists them."""

    name = "vision_transformer, deit, beit and eva"
    models = MODELS
    blocks = BLOCKS
    attentions = ATTENTIONS
    is_pyramid = False

    def paths(self, model: nn.Module) -> list[list[str]]:
        return [[f"blocks.{index}" for index in range(len(attention_blocks(model)))]]

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        return image_size(model)

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        return [Geometry(len(prefix_kinds(model)), patch_grid(vit(model).patch_embed, size))]

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        vit(model).set_input_size(img_size=size)

    def with_blocks(self, model: nn.Module, blocks: Sequence[nn.Module], *, cut: bool) -> nn.Module:
        twin = shallow(model)
        twin._modules["blocks"] = listed(submodule(model, "blocks"), blocks)
        return twin
