"""Tiny models of timm's other families, one of each kind, with random weights everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from graftvit.models.families import create_timm_model
from support.models.dense import attend, images
from timm.layers.diff_attention import DiffAttention
from timm.models import (
    cait,
    efficientformer,
    gcvit,
    levit,
    metaformer,
    mvitv2,
    nest,
    register_model,
    swin_transformer_v2_cr,
    volo,
)
from torch import Tensor, nn

SIZE, OTHER = (32, 48), (48, 24)


@dataclass(frozen=True)
class Tiny:
    """A kind of model: timm's name and arguments, and what of it is its own."""

    name: str
    arguments: dict[str, Any]
    whole: dict[str, Any] | None = field(default_factory=dict)
    """Arguments that make every layer attend to all tokens; None if the family cannot."""
    biased: bool = False
    """Its layers have a bias that an operator does not take; `without` gives it up if `gives_up`."""
    gives_up: bool = False
    resizes: bool = True
    own_products: int = 0
    """Multiply-adds that belong to no layer: of positions, between channels, and of class tokens."""
    rounding: float = 1e-5
    """The largest relative error of an exported model, in float32: squares as activations double it, layer by layer."""
    size: tuple[int, int] = SIZE
    other: tuple[int, int] = OTHER


def _cosine(layer: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The other Swin V2: cosines with a learned scale, and a bias of a network of distances."""
    q, k, v = layer.qkv(x).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scale = layer.logit_scale.clamp(max=math.log(100.0)).exp()[:, None, None]
    q, k = (F.normalize(each, dim=-1) for each in (q, k))
    bias = layer._relative_positional_encodings()
    if mask is not None:
        bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
    out = F.scaled_dot_product_attention(q * scale, k, v, attn_mask=bias, scale=1.0)
    return layer.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _context(layer: Any, x: Tensor, q_global: Tensor | None = None) -> Tensor:
    """GC ViT: a bias of relative positions; the queries may be those of the whole image."""
    by_head = layer.qkv(x).unflatten(2, (-1, layer.num_heads, layer.head_dim)).permute(2, 0, 3, 1, 4)
    if layer.use_global:  # no site
        assert q_global is not None
        k, v = by_head
        q = q_global.flatten(1, 2).repeat_interleave(len(x) // len(q_global), 0)
        q = q.unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
        out = attend(q, k, v, layer.rel_pos.get_bias(), layer.scale).out
    else:
        out = F.scaled_dot_product_attention(*by_head, attn_mask=layer.rel_pos.get_bias())
    return layer.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _levit(layer: Any, x: Tensor) -> Tensor:
    """LeViT, EfficientFormer: a bias of distances, and values wider than keys, here as several heads."""
    tokens = layer.qkv(x).flatten(2).transpose(1, 2) if x.dim() == 4 else layer.qkv(x)
    widths, count = [layer.key_dim, layer.key_dim, layer.val_dim], layer.val_dim // layer.key_dim
    q, k, v = tokens.unflatten(2, (layer.num_heads, -1)).transpose(1, 2).split(widths, 3)
    v = v.unflatten(3, (count, -1)).transpose(2, 3).flatten(1, 2)
    q, k = (each.repeat_interleave(count, 1) for each in (q, k))
    bias = layer.attention_biases[:, layer.attention_bias_idxs].repeat_interleave(count, 0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    shown = out.transpose(1, 2).unflatten(2, x.shape[2:]) if x.dim() == 4 else out
    return layer.proj(shown)  # type: ignore[no-any-return]


def _pooling(layer: Any, x: Tensor, feat_size: Any) -> tuple[Tensor, Any]:
    """MViTv2: pooled queries, keys and values, decomposed relative positions, and the queries added."""
    prefix, parts, grids = int(layer.has_cls_token), [], []
    for name, part in zip("qkv", layer.qkv(x).unflatten(2, (3, layer.num_heads, -1)).unbind(2), strict=True):
        pool, norm = getattr(layer, f"pool_{name}"), getattr(layer, f"norm_{name}")
        by_head = part.transpose(1, 2)
        image = by_head[:, :, prefix:].transpose(2, 3).unflatten(3, tuple(feat_size))
        image = torch.stack([pool(head) for head in image.unbind(1)], 1)
        parts.append(norm(torch.cat([by_head[:, :, :prefix], image.flatten(3).transpose(2, 3)], 2)))
        grids.append(image.shape[3:])
    q, k, v = parts
    bias = q.new_zeros(*q.shape[:3], k.shape[2])
    places = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in grids[:2]]
    for axis, table in enumerate((layer.rel_pos_h, layer.rel_pos_w)):
        of_q, of_k = grids[0][axis], grids[1][axis]
        steps = max(of_k // of_q, 1), max(of_q // of_k, 1)
        row = places[0][:, None, axis] * steps[0] - (places[1][None, :, axis] - (of_k - 1)) * steps[1]
        bias[:, :, prefix:, prefix:] += (q[:, :, prefix:, None] * table[row]).sum(-1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias) + q
    return layer.proj(out.transpose(1, 2).flatten(2)), grids[0]


def _plain(layer: Any, x: Tensor) -> Tensor:
    """CaiT without its mixing of heads: what an operator replaces."""
    q, k, v = layer.qkv(x).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _difference(layer: Any, x: Tensor) -> Tensor:
    """Differential attention without its second map: what an operator replaces, on heads of both halves."""
    q, k, v = layer.qkv(x).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=layer.scale)
    out = layer.sub_norm(out) * (1 - layer.lambda_init)
    return layer.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


FUSED: dict[type[nn.Module], Callable[..., Tensor]] = {
    swin_transformer_v2_cr.WindowMultiHeadAttention: _cosine,
    gcvit.WindowAttentionGlobal: _context,
    levit.Attention: _levit,
    efficientformer.Attention: _levit,
    cait.TalkingHeadAttn: _plain,
    DiffAttention: _difference,
    mvitv2.MultiScaleAttention: _pooling,
}
"""The equations of layers that timm computes without torch's function for attention, with it."""

PLAIN = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
ENCODER = {**PLAIN, "mlp_ratio": 2.0}
STAGES: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "num_classes": 3}
MAXVIT = {
    "embed_dim": (16, 32), "depths": (1, 1), "block_type": ("M", "M"), "stem_width": (8, 8), "num_classes": 3,
    "transformer_dim_head": 8, "transformer_partition_ratio": 8,
}  # fmt: skip
ONE_STAGE = {
    "embed_dim": (16,), "depths": (1,), "block_type": ("M",), "transformer_partition_ratio": 4,
}  # fmt: skip
LEVIT = {
    "embed_dim": (16, 32), "key_dim": 4, "num_heads": (2, 4), "depth": (1, 1), "stem_type": "s8", "num_classes": 3,
}  # fmt: skip
PIT = {
    "patch_size": 8, "stride": 4, "base_dims": (8, 8), "depth": (1, 2), "heads": (1, 2), "num_classes": 3,
}  # fmt: skip
ONE_PIT = {"stride": 8, "base_dims": (8,), "depth": (2,), "heads": (2,)}
ONE_LEVIT = {"embed_dim": (16,), "num_heads": (2,), "depth": (2,)}
HIERA = {
    "embed_dim": 16, "num_heads": 2, "stages": (2, 2), "q_pool": 1, "mask_unit_size": (2, 2),
    "mask_unit_attn": (True, False), "num_classes": 3,
}  # fmt: skip
ONE_HIERA = {"stages": (2,), "q_pool": 0, "mask_unit_size": (1, 1), "mask_unit_attn": (False,)}
MVIT = {"embed_dim": (16, 32), "depths": (2, 3), "num_heads": (2, 4), "stride_q": ((1, 1), (2, 2))}


def _register_free(name: str, create: Callable[..., nn.Module], **kinds: Any) -> None:
    """Register `free_` and a name of timm, which takes the depths and widths that timm's own name fixes."""

    def free(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return create(name, pretrained, **{**kinds, **arguments})

    free.__name__, free.__module__ = f"free_{name}", create.__module__  # which tells its family
    register_model(free)


_register_free("gcvit_xxtiny", gcvit._create_gcvit)
_register_free("nest_tiny", nest._create_nest)
_register_free("volo_d1_224", volo._create_volo)
_register_free(
    "caformer_s18",
    metaformer._create_metaformer,
    token_mixers=[metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
    norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
)
mvitv2.model_cfgs |= {  # the only way to a model of another size
    "tiny": mvitv2.MultiScaleVitCfg(**MVIT, stride_kv_adaptive=(2, 2)),
    "tiny_cls": mvitv2.MultiScaleVitCfg(
        **MVIT, stride_kv_adaptive=(2, 2), use_cls_token=True, expand_attn=False
    ),
    "whole": mvitv2.MultiScaleVitCfg((2,), (16,), (2,), stride_q=((1, 1),), stride_kv=((1, 1),)),
    "whole_cls": mvitv2.MultiScaleVitCfg(
        (2,), (16,), (2,), stride_q=((1, 1),), stride_kv=((1, 1),), use_cls_token=True
    ),
}
CAFORMER: dict[str, Any] = {
    "depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16), "head_dim": 8, "layer_scale_init_values": 0.0, "num_classes": 3,
}  # fmt: skip
ONE_CAFORMER = {
    "depths": (2,), "dims": (16,), "token_mixers": metaformer.Attention, "norm_layers": metaformer.LayerNormNoBias,
}  # fmt: skip
TINY = {
    "mvitv2": Tiny(
        "mvitv2_tiny",
        {"cfg_variant": "tiny", "num_classes": 3},
        whole={"cfg_variant": "whole"}, biased=True, gives_up=True, size=(32, 32), other=(64, 64),
        own_products=98_304,
    ),
    "mvitv2_cls": Tiny(
        "mvitv2_tiny",
        {"cfg_variant": "tiny_cls", "num_classes": 3},
        whole={"cfg_variant": "whole_cls"}, biased=True, gives_up=True, size=(32, 32), other=(64, 64),
        own_products=103_488,
    ),
    "sam2": Tiny(
        "sam2_hiera_tiny",
        {
            "embed_dim": 16, "num_heads": 2, "stages": (2, 3), "q_pool": 1, "window_spec": (4, 4),
            "global_att_blocks": (4,), "global_pos_size": (3, 3), "num_classes": 3,
        },
        whole={"stages": (2,), "q_pool": 0, "window_spec": (4,), "global_att_blocks": (0, 1)},
        own_products=24_576, other=(48, 32),
    ),
    "hiera": Tiny("hiera_tiny_224", HIERA, whole=ONE_HIERA, own_products=6144),
    "levit": Tiny("levit_128s", LEVIT, whole=ONE_LEVIT, biased=True, gives_up=True, own_products=11_520),
    "levit_conv": Tiny("levit_conv_128s", LEVIT, whole=ONE_LEVIT, biased=True, gives_up=True, own_products=11_520),
    "efficientformer": Tiny(
        "efficientformer_l1",
        {"depths": (1, 3), "embed_dims": (8, 16), "num_vit": 2, "num_classes": 3},
        biased=True, gives_up=True,
    ),
    "maxvit": Tiny("test_maxvit", MAXVIT, whole=ONE_STAGE, biased=True, gives_up=True),
    "maxvit_tf": Tiny(
        "test_maxvit",
        {**MAXVIT, "transformer_head_first": True, "transformer_rel_pos_type": "bias_tf"},
        own_products=90_816, whole=ONE_STAGE, biased=True, gives_up=True,
    ),
    "gcvit": Tiny(
        "free_gcvit_xxtiny",
        {
            "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_ratio": (16, 16), "num_classes": 3,
        },
        whole={"depths": (3,), "num_heads": (2,), "window_ratio": (4,), "layer_scale": 0.5},
        biased=True, gives_up=True, size=(64, 64),
        own_products=196_608, other=(96, 96),
    ),
    "nest": Tiny(
        "free_nest_tiny",
        {"embed_dims": (8, 16, 16), "depths": (1, 1, 2), "num_heads": (1, 2, 2), "num_classes": 3},
        whole={"num_levels": 1, "embed_dims": (16,), "depths": (2,), "num_heads": (2,), "patch_size": 8},
        size=(32, 32), other=(48, 48),
    ),
    "tiny_vit": Tiny(
        "tiny_vit_5m_224",
        {
            "embed_dims": (8, 16, 32), "depths": (1, 1, 1), "num_heads": (1, 2, 4), "window_sizes": (3, 3, 2),
            "num_classes": 3,
        },
        whole={"embed_dims": (8, 16), "depths": (1, 2), "num_heads": (1, 2), "window_sizes": (3, 4)},
        biased=True, gives_up=True, size=(32, 32),
    ),
    "swinv2_cr": Tiny(
        "swinv2_cr_tiny_224",
        {**STAGES, "depths": (2, 1), "window_size": 3},
        whole={"embed_dim": 16, "depths": (2,), "num_heads": (2,), "window_size": (8, 12)},
        biased=True, gives_up=True,
    ),
    "davit": Tiny(
        "davit_tiny",
        {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (2, 4), "window_size": 3, "num_classes": 3},
        whole={"embed_dims": (16,), "depths": (2,), "num_heads": (2,), "window_size": (8, 12)},
        own_products=36_864,
    ),
    "sam": Tiny(
        "samvit_base_patch16_224",
        {**PLAIN, "window_size": 3, "global_attn_indexes": (1,), "neck_chans": 12},
        whole={"window_size": 0},
        biased=True, gives_up=True, own_products=7296,
    ),
    "relpos": Tiny("vit_relpos_base_patch32_plus_rpn_256", PLAIN, biased=True),
    "relpos_mlp": Tiny(
        "vit_relpos_small_patch16_224", {**PLAIN, "rel_pos_type": "mlp", "class_token": True}, biased=True
    ),
    "srelpos": Tiny("vit_srelpos_small_patch16_224", {**PLAIN, "qk_norm": True}, biased=True),
    "qwen3": Tiny("qwen3_vit_88m", {**ENCODER, "pos_embed_grid_size": 4}),
    "naflex": Tiny("naflexvit_so150m2_patch16_reg1_gap", {**ENCODER, "pos_embed_grid_size": (4, 4)}),
    "naflex_rope": Tiny(
        "naflexvit_base_patch16_gap", {**ENCODER, "rope_type": "axial", "class_token": True, "qkv_fused": False}
    ),
    "gemma4": Tiny(
        "gemma4_vit_167m",
        {**PLAIN, "head_dim": 16, "intermediate_size": 32, "num_kv_heads": 1, "use_clipped_linears": False},
        own_products=7_864_512,
    ),
    "cait": Tiny(
        "cait_xxs24_224",
        {**PLAIN, "depth_token_only": 1, "init_values": 0.5},
        whole=None, own_products=800,
    ),
    "differential": Tiny(
        "vit_dwee_patch16_reg1_gap_256", {**PLAIN, "init_values": 0.5, "qkv_bias": False}, whole=None,
    ),
    "deepseek": Tiny("deepseek_vit_412m", ENCODER),
    "pit": Tiny("pit_s_224", PIT, whole=ONE_PIT),
    "pit_distilled": Tiny("pit_s_distilled_224", PIT, whole=ONE_PIT),
    "volo": Tiny(
        "free_volo_d1_224",
        {
            "layers": (1, 1, 2), "embed_dims": (8, 16, 16), "num_heads": (1, 2, 2), "patch_size": 4,
            "stem_hidden_dim": 8, "mlp_ratio": 0.25, "num_classes": 3,
        },
        own_products=17_152,
    ),
    "caformer": Tiny("free_caformer_s18", CAFORMER, whole=ONE_CAFORMER, rounding=5e-5),
    "visformer": Tiny("visformer_tiny", {**PLAIN, "init_channels": 8, "conv_init": False, "depth": (1, 1, 1)}),
}  # fmt: skip


def arguments(kind: str, size: tuple[int, int] | None = None, **more: Any) -> dict[str, Any]:
    """Return the arguments of timm's constructor."""
    return {**TINY[kind].arguments, "img_size": size or TINY[kind].size, **more}


def tiny(
    kind: str,
    size: tuple[int, int] | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> nn.Module:
    """Return a tiny model with random weights everywhere, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        given = arguments(kind, size, **more)
        model = create_timm_model(TINY[kind].name, **given)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def pictures(kind: str, *, dtype: torch.dtype = torch.float64, size: tuple[int, int] | None = None) -> Tensor:
    """Return images of the size of a kind."""
    return images(dtype=dtype, size=size or TINY[kind].size)


def whole(kind: str, **more: Any) -> nn.Module:
    """Return a tiny model in float64 whose layers attend to all tokens."""
    given = {**(TINY[kind].whole or {}), **more}
    return tiny(kind, dtype=torch.float64, **given)


WHOLE = [kind for kind, each in TINY.items() if each.whole is not None]
