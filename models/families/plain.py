"""Plain vision transformers: one list of blocks, which all have the same tokens, heads and widths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from timm.layers import Attention, AttentionRope
from timm.layers.diff_attention import DiffAttention
from timm.layers.mlp import GluMlp, SwiGLU
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block as PlainBlock
from timm.models.vision_transformer import ResPostBlock
from timm.models.vision_transformer import VisionTransformer as VisionTransformer
from torch import Tensor, nn

from ..attention.base import Geometry, Heads
from ..errors import UnsupportedModelError
from ..host import AttentionHost
from ..map_structure import MapStructure, Size
from ..plan_syntax import KEEP
from .site import (
    Block,
    Family,
    Hosts,
    NativeParts,
    Site,
    listed,
    named_heads,
    shallow,
    size_of,
    submodule,
    vit,
)

MODELS = (VisionTransformer, Beit, Eva)
BLOCKS = (PlainBlock, ResPostBlock, BeitBlock, EvaBlock, EvaBlockPostNorm)
ATTENTIONS = (Attention, AttentionRope, BeitAttention, EvaAttention)
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
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{model!r} is no model: give an nn.Module")
    own = model._modules.get("blocks")  # not the callables of `replay.py`
    return list(getattr(model, "blocks", ()) if own is None else cast(Iterable[Block], own))


def classifier_of(model: nn.Module) -> nn.Module | None:
    """Return the classifier layer, or None."""
    found = vit(model).get_classifier() if hasattr(model, "get_classifier") else None
    return found if isinstance(found, nn.Module) else None


def pooling_of(model: nn.Module) -> str | None:
    """Return the pooling before a model's head in timm's word, "" for none; None for a model that does not say it."""
    pooling = getattr(model, "global_pool", None)
    pooling = getattr(pooling, "pool_type", pooling)  # of timm's module for it
    return pooling if isinstance(pooling, str) else None


def has_relative_bias(model: nn.Module) -> bool:
    """Return whether the model adds a relative position bias, tied to its grid, to its attention logits."""
    return getattr(model, "rel_pos_bias", None) is not None or any(
        getattr(getattr(block, "attn", None), "relative_position_bias_table", None) is not None
        for block in attention_blocks(model)
    )


def token_layout(model: nn.Module) -> TokenLayout:
    """Return the tokens of a model's sequence: ("cls", "dist", "reg0", …) and the patch grid (height, width).

    The grid is that of the model's image size; with `dynamic_img_size`, other sizes have other grids.

    Args:
        model: a plain vision transformer.
    """
    _check_plain(model)
    size = size_of(getattr(model, "patch_embed", None))
    if size is None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} was built without an image size, so its number of patches is unknown: "
            "build it with img_size"
        )
    return TokenLayout(prefix_kinds(model), patch_grid(vit(model).patch_embed, size))


def prefix_kinds(model: nn.Module) -> tuple[str, ...]:
    """Return the kinds of prefix tokens: "cls", "dist", "reg0", …"""
    registers = getattr(model, "reg_token", None)
    prefix = ["cls"] if getattr(model, "cls_token", None) is not None else []
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

    Args:
        model: a plain vision transformer.

    Raises:
        UnsupportedModelError: the model is no plain vision transformer.
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


DEFAULT_LAYER_SCALE = 1e-5  # timm's own, for releases whose LayerScale does not keep its initial value
ACTIVATIONS = {
    "GELU": "gelu",
    "QuickGELU": "quick_gelu",
    "GELUTanh": "gelu_tanh",
    "SiLU": "silu",
    "ReLU": "relu",
}


def native_parts(model: nn.Module) -> NativeParts:
    """Read the parts from the embeddings and the first block (all blocks of a model are alike)."""
    block = attention_blocks(model)[0]
    attention = block.attn
    registers = getattr(model, "reg_token", None)
    return NativeParts(
        layer_scale=layer_scale_init(block),
        registers=0 if registers is None else int(registers.shape[1]),
        pre_norm=has_norm(getattr(model, "norm_pre", None)),
        activation=_activation(block.mlp),
        mlp=_mlp(block.mlp),
        position=_position(model, attention),
        qk_norm=has_norm(getattr(attention, "q_norm", None)),
        attention_norm=has_norm(getattr(attention, "norm", None)),
        gate=getattr(attention, "gate", None) is not None,
        qkv_bias=has_qkv_bias(attention),
        pooling=str(getattr(model, "global_pool", "")),
    )


def has_norm(module: nn.Module | None) -> bool:
    """Return whether an optional module is present, that is, neither None nor an identity."""
    return module is not None and not isinstance(module, nn.Identity)


def layer_scale_init(block: nn.Module) -> float | None:
    """Return the initial value of a block's LayerScale; None without LayerScale."""
    scale = getattr(block, "ls1", None)
    if has_norm(scale):
        return float(getattr(scale, "init_values", DEFAULT_LAYER_SCALE))
    if getattr(block, "gamma_1", None) is not None:
        return float(getattr(block, "init_values", DEFAULT_LAYER_SCALE))
    return None


def has_qkv_bias(attention: Any) -> bool:
    """Return whether queries have a bias, wherever the attention layer stores it."""
    if getattr(attention, "q_bias", None) is not None:
        return True
    projection = attention.qkv if attention.qkv is not None else attention.q_proj
    return projection.bias is not None


def _activation(mlp: Any) -> str:
    name = type(mlp.act).__name__
    return ACTIVATIONS.get(name, name)


def _mlp(mlp: Any) -> str:
    gated = "SwiGLU" if _activation(mlp) == "silu" else "GLU"
    kind = gated if isinstance(mlp, GluMlp | SwiGLU) else "MLP"
    return f"{kind} with norm" if has_norm(getattr(mlp, "norm", None)) else kind


def _position(model: nn.Module, attention: Any) -> tuple[str, ...]:
    present = {
        "learned absolute": getattr(model, "pos_embed", None) is not None,
        "relative bias": getattr(attention, "relative_position_bias_table", None) is not None,
        "shared relative bias": getattr(model, "rel_pos_bias", None) is not None,
        "rotary": getattr(model, "rope", None) is not None,
    }
    return tuple(kind for kind, there in present.items() if there)


def plain_block(**arguments: Any) -> nn.Module:
    """Return a new block of a plain vision transformer, with the arguments of timm's `Block`."""
    return PlainBlock(**arguments)


# What a student mirrors of a plain teacher: its constructor, and how that reads sizes.


def constructor_of(model: nn.Module) -> type[nn.Module]:
    """Return timm's class of a plain vision transformer."""
    return next(kind for kind in MODELS if isinstance(model, kind))


def poolings_of(model: nn.Module) -> tuple[str, ...] | None:
    """Return the poolings that a model's constructor takes; None for those of VisionTransformer and Eva."""
    return ("", "avg", "token") if isinstance(model, Beit) else None


def hidden_ratio(model: nn.Module) -> int:
    """Return how often the MLP ratio of a constructor counts the hidden width: gate and value together are two."""
    gated = native_parts(model).mlp.startswith(("SwiGLU", "GLU"))
    return 2 if isinstance(model, VisionTransformer) and gated else 1


def is_post_norm(block: nn.Module) -> bool:
    """Return whether a block of EVA has its norms after attention and MLP."""
    return isinstance(block, EvaBlockPostNorm)


class OneStage(Family):
    """A model with one list of blocks, `blocks`, on one grid of patches."""

    def trunk(self, model: nn.Module) -> str:
        """Return the name of the part that has the blocks, with a point; empty where it is the model itself."""
        return ""

    def embedding(self, model: nn.Module) -> nn.Module:
        return submodule(model, f"{self.trunk(model)}patch_embed")

    def paths(self, model: nn.Module) -> list[list[str]]:
        blocks = submodule(model, f"{self.trunk(model)}blocks")
        return [[f"{self.trunk(model)}blocks.{name}" for name in blocks._modules]]

    def prefix(self, model: nn.Module, site: Site) -> tuple[str, ...]:
        return prefix_kinds(model)

    def fixed_size(self, model: nn.Module) -> tuple[int, int] | None:
        return self.image_size(model) if getattr(self.embedding(model), "strict_img_size", True) else None

    def patch_size(self, model: nn.Module) -> tuple[int, int]:
        embedding = cast(Any, self.embedding(model))
        # an embedding behind convolutions says by how much both reduce the image
        ratio = getattr(embedding, "feat_ratio", None)
        height, width = embedding.patch_size if ratio is None else ratio(as_scalar=False)
        return int(height), int(width)

    def image_step(self, model: nn.Module) -> tuple[int, int]:
        return self.patch_size(model)

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        return size_of(self.embedding(model))

    def known_size(self, model: nn.Module) -> tuple[int, int] | None:
        return self.image_size(model)

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        return [Geometry(len(prefix_kinds(model)), patch_grid(self.embedding(model), size))]

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        vit(model).set_input_size(img_size=size)

    def with_blocks(self, model: nn.Module, blocks: Sequence[nn.Module], *, cut: bool) -> nn.Module:
        trunk = self.trunk(model)
        twin = shallow(submodule(model, trunk))
        twin._modules["blocks"] = listed(submodule(twin, "blocks"), blocks)
        if not trunk:
            return twin
        whole = shallow(model)
        whole._modules[trunk.removesuffix(".")] = twin
        return whole

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return [submodule(model, self.trunk(model))]


class DiffHost(AttentionHost):
    """The difference of two softmax maps, N((P₁ − λ P₂) V) (1 − λ₀).

    P₁ and P₂ are of the first and the second half of queries and keys, N is the norm of a head (Ye et al. 2025, arXiv
    2410.05258). Natively each half is a head of queries and keys, and there are half as many heads of values. A
    converted layer has heads of both halves, whose logits are the sum of the two, and keeps the norm after them.
    """

    after_heads = ("sub_norm", "norm", "proj", "proj_drop")

    def structure(self, grid: Size) -> MapStructure:
        return MapStructure(mixed=True)

    def has_whole_map(self, geometry: Geometry) -> bool:
        return False

    def all_pairs(self, geometry: Geometry) -> int:
        """Return the pairs of queries and keys of whole heads as costs count them: both maps read all values."""
        return super().all_pairs(geometry) * 3 // 2

    def project(
        self, x: Tensor, rope: Tensor | None = None, shared_rel_pos_bias: Tensor | None = None
    ) -> Heads:
        heads = super().project(x, rope, shared_rel_pos_bias)
        if not self.permanent:
            heads.q, heads.k = (None if part is None else _halves(part) for part in (heads.q, heads.k))
            heads.to_map = self._difference
        return heads

    def merge(self, out_BHND: Tensor, x: Tensor) -> Tensor:
        return super().merge(self._child("sub_norm", out_BHND) * (1 - self.original.lambda_init), x)

    def _position(self, part: str, x_BHND: Tensor, rope: Tensor | None) -> Tensor:
        if part == "v":
            return x_BHND
        return self._child(f"{part}_norm", x_BHND.unflatten(3, (2, -1))).flatten(3)

    def _difference(self, logits_BHNN: Tensor) -> Tensor:
        first, second = logits_BHNN.softmax(-1).unflatten(1, (-1, 2)).unbind(2)
        return first - self.original._compute_lambda().type_as(first) * second


def _halves(x_BHND: Tensor) -> Tensor:
    """Return the two halves of each head as heads, (B, 2 H, N, D / 2)."""
    halves: Tensor = x_BHND.unflatten(3, (2, -1)).transpose(2, 3)
    return halves.flatten(1, 2)


class Plain(OneStage):
    """timm's plain vision transformers, as `SUPPORTED` lists them."""

    name = "vision_transformer, deit, beit and eva"
    models = MODELS
    blocks = BLOCKS
    hosts: ClassVar[Hosts] = {**dict.fromkeys(ATTENTIONS, AttentionHost), DiffAttention: DiffHost}
    post_norm = (ResPostBlock, EvaBlockPostNorm)
    kept = KEEP
    keeps_all = True
    told_by = "blocks.0."
    cannot: ClassVar[Mapping[str, str]] = {
        "none": "has no other layers in which tokens meet: name an operator, such as uniform",
        "without": "keeps every part of its layers: leave it out",
    }

    def native_parts(self, model: nn.Module) -> NativeParts:
        return native_parts(model)

    def has_bias(self, model: nn.Module, site: Site) -> bool:
        return getattr(model, "rel_pos_bias", None) is not None or super().has_bias(model, site)

    def classifiers(self, model: nn.Module) -> dict[str, nn.Module]:
        return named_heads(model)


FAMILIES = (Plain(),)
