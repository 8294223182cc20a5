"""Key maps of Hugging Face transformers: one row for each kind of file, recognized by its keys alone."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..weight_files import Weights
from . import hf_families as to_timm
from .keymap import KeyMap

# transformers' names of the parts of its vision towers: those of its files and those of its modules.

Rules = tuple[tuple[str, str], ...]
LAYER = r"(?:(?:model|encoder)\.)?layers?\.(\d+)\."
LINEAR = r"\.(weight|bias)"


def _layers(prefix: str, parts: Rules) -> Rules:
    """(part of a layer, timm's part of a block) as rules of whole names; \\2 is the part's first group."""
    return tuple((prefix + LAYER + part, r"blocks.\1." + name) for part, name in parts)


MASK_TOKEN = (r"(?:\w+\.)?embeddings\.mask_token", "only masked training uses it")
POOLER = (r"(?:\w+\.)?pooler\.dense\..*", "timm has no pooler with a dense layer and tanh")
SIMMIM = (r"decoder\.\d+\..*", "the decoder of masked image modelling")
INDEX = (r".*\.relative_position_index|.*embeddings\.position_ids|.*inv_freq", "it is computed")

QKV = (
    (r"attention\.attention\.([qkv])\w+" + LINEAR, r"attn.qkv.\3[\2]"),
    (r"attention\.([qkv])_proj" + LINEAR, r"attn.qkv.\3[\2]"),
)
AFTER_ATTENTION = (
    (r"attention\.(?:output\.dense|o_proj)" + LINEAR, r"attn.proj.\2"),
    (r"(?:intermediate\.dense|mlp\.fc1)" + LINEAR, r"mlp.fc1.\2"),
    (r"(?:output\.dense|mlp\.fc2)" + LINEAR, r"mlp.fc2.\2"),
    (r"layernorm_before" + LINEAR, r"norm1.\2"),
    (r"layernorm_after" + LINEAR, r"norm2.\2"),
)


def _embeddings(prefix: str) -> Rules:
    return (
        (prefix + r"embeddings\.cls_token", "cls_token"),
        (prefix + r"embeddings\.position_embeddings", "pos_embed"),
        (prefix + r"embeddings\.patch_embeddings\.(?:projection\.)?(weight|bias)", r"patch_embed.proj.\1"),
        (prefix + r"layernorm" + LINEAR, r"norm.\1"),
        (r"classifier" + LINEAR, r"head.\1"),
    )


VIT = r"(?:(?:vit|deit)\.)?"
VIT_MARKS = (VIT + r"embeddings\.cls_token", VIT + LAYER + r"layernorm_before\.weight")
VIT_NAMES = (*_embeddings(VIT), *_layers(VIT, (*QKV, *AFTER_ATTENTION)))
DISTILLATION = VIT + r"embeddings\.distillation_token"
DEIT_NAMES = (
    (r"cls_classifier" + LINEAR, r"head.\1"),
    (r"distillation_classifier" + LINEAR, r"head_dist.\1"),
    (DISTILLATION, "dist_token"),
    *VIT_NAMES,
)

BEIT = r"(?:beit\.)?"
TABLE = r"relative_position_bias_table"
BEIT_NAMES = (
    (BEIT + r"pooler\.layernorm" + LINEAR, r"fc_norm.\1"),
    (rf"{BEIT}(?:encoder\.relative_position_bias|shared_position_bias)\.{TABLE}", f"rel_pos_bias.{TABLE}"),
    (r"layernorm" + LINEAR, r"norm.\1"),
    *_embeddings(BEIT),
    *_layers(
        BEIT,
        (
            (r"attention\.(?:attention\.([qv])\w+|([qv])_proj)\.bias", r"attn.\2\3_bias"),
            *QKV,
            (rf"(?:attention\.attention\.)?relative_position_bias\.({TABLE})", r"attn.\2"),
            (r"lambda_([12])", r"gamma_\2"),
            *AFTER_ATTENTION,
        ),
    ),
)

DINO = r"(?:dinov2(?:_with_registers)?\.)?"
DINO_MARKS = (DINO + r"embeddings\.cls_token", DINO + LAYER + r"layer_scale1\.lambda1")
NORMS: Rules = ((r"norm([12])" + LINEAR, r"norm\2.\3"),)
DINOV2_NAMES = (
    (DINO + r"embeddings\.register_tokens", "reg_token"),
    *_embeddings(DINO),
    *_layers(
        DINO,
        (
            *QKV,
            *AFTER_ATTENTION,
            *NORMS,
            (r"layer_scale([12])\.lambda1", r"ls\2.gamma"),
            (r"mlp\.weights_in" + LINEAR, r"mlp.fc1.\2"),
            (r"mlp\.(gate|up)_proj" + LINEAR, r"mlp.fc1.\3[\2]"),
            (r"mlp\.(?:weights_out|down_proj)" + LINEAR, r"mlp.fc2.\2"),
        ),
    ),
)
DINOV2_CLASSIFIER = (
    r"classifier\..*",
    "it reads the class token beside the patches' mean, timm's head one token",
)

DINOV3_MARKS = (r"embeddings\.patch_embeddings\.weight", LAYER + r"layer_scale1\.lambda1")
GATE = LAYER + r"mlp\.gate_proj\.weight"
GATED: Rules = ((r"mlp\.gate_proj" + LINEAR, r"mlp.fc1_g.\2"), (r"mlp\.up_proj" + LINEAR, r"mlp.fc1_x.\2"))
NOT_GATED: Rules = ((r"mlp\.up_proj" + LINEAR, r"mlp.fc1.\2"),)


def dinov3_names(first: Rules) -> Rules:
    parts = (
        (r"attention\.([qv])_proj\.bias", r"attn.\2_bias"),
        *QKV,
        *AFTER_ATTENTION,
        *NORMS,
        (r"layer_scale([12])\.lambda1", r"gamma_\2"),
        *first,
        (r"mlp\.down_proj" + LINEAR, r"mlp.fc2.\2"),
    )
    return ((r"embeddings\.register_tokens", "reg_token"), *_embeddings(""), *_layers("", parts))


TOWER = r"(?:vision_model\.)?"
TOWER_MARKS = (TOWER + r"embeddings\.patch_embedding\.weight", TOWER + r"post_layernorm\.weight")
CLASS_EMBEDDING = TOWER + r"embeddings\.class_embedding"
TEXT: Rules = (
    (r"text_model\..*|text_projection\..*|logit_scale|logit_bias", "the text tower and what joins the two"),
    (r"visual_projection\..*", "the projection to the space of texts, no classifier"),
    INDEX,
)
TOWER_NAMES = (
    (TOWER + r"embeddings\.class_embedding", "cls_token"),
    (TOWER + r"embeddings\.position_embedding\.weight", "pos_embed"),
    (TOWER + r"embeddings\.patch_embedding" + LINEAR, r"patch_embed.proj.\1"),
    (TOWER + r"pre_layrnorm" + LINEAR, r"norm_pre.\1"),
    (TOWER + r"post_layernorm" + LINEAR, r"norm.\1"),
    (TOWER + r"head\.probe", "attn_pool.latent"),
    (TOWER + r"head\.attention\.(q|kv)" + LINEAR, r"attn_pool.\1.\2"),
    (TOWER + r"head\.attention\.out_proj" + LINEAR, r"attn_pool.proj.\1"),
    (TOWER + r"head\.layernorm" + LINEAR, r"attn_pool.norm.\1"),
    (TOWER + r"head\.mlp\.(fc[12])" + LINEAR, r"attn_pool.mlp.\1.\2"),
    (r"classifier" + LINEAR, r"head.\1"),
    *_layers(
        TOWER,
        (
            (r"self_attn\.([qkv])_proj" + LINEAR, r"attn.qkv.\3[\2]"),
            (r"self_attn\.out_proj" + LINEAR, r"attn.proj.\2"),
            (r"layer_norm([12])" + LINEAR, r"norm\2.\3"),
            (r"mlp\.(fc[12])" + LINEAR, r"mlp.\2.\3"),
        ),
    ),
)


# Change transformers' tensors where a new name is not enough: cut, fold, or change the rank for timm.


def fold_registers(weights: Weights) -> Weights:
    """DINOv2 with registers: the class token with its position, and the positions of the patches alone."""
    tensors = dict(weights.tensors)
    prefix = next(key for key in tensors if key.endswith("embeddings.cls_token")).removesuffix("cls_token")
    token, position = tensors[f"{prefix}cls_token"], tensors.get(f"{prefix}position_embeddings")
    if position is not None and position.ndim == 3 and token.shape == (1, 1, position.shape[2]):
        tensors[f"{prefix}cls_token"] = token + position[:, :1]
        tensors[f"{prefix}position_embeddings"] = position[:, 1:]
    return replace(weights, tensors=tensors)


def split_probe(weights: Weights) -> Weights:
    """SigLIP's pooling: the projection of its query apart from that of keys and values."""
    tensors = dict(weights.tensors)
    for key in [key for key in tensors if ".attention.in_proj_" in key]:
        stem, kind = key.rsplit("in_proj_", 1)
        joined = tensors[key]
        if joined.ndim and joined.shape[0] % 3 == 0:
            del tensors[key]
            query, rest = joined.tensor_split([joined.shape[0] // 3])
            tensors |= {f"{stem}q.{kind}": query, f"{stem}kv.{kind}": rest}
    return replace(weights, tensors=tensors)


def drop_empty_registers(weights: Weights) -> Weights:
    """DINOv3 without registers, whose token is there and empty."""
    empty = {
        key
        for key, tensor in weights.tensors.items()
        if key.endswith("register_tokens") and not tensor.numel()
    }
    left = dict.fromkeys(empty, "there are none")
    tensors = {key: tensor for key, tensor in weights.tensors.items() if key not in empty}
    return replace(weights, tensors=tensors, left_out={**weights.left_out, **left})


def as_batch(name: str, tensor: Tensor) -> Tensor:
    """CLIP's and SigLIP's tokens and positions with the batch axis that timm gives them."""
    if name == "pos_embed" and tensor.ndim == 2:
        return tensor[None]
    return tensor[None, None] if name == "cls_token" and tensor.ndim == 1 else tensor


FOR_VIT = (MASK_TOKEN, POOLER, SIMMIM)
FOR_DINO = (MASK_TOKEN, INDEX)
CLASSIFIER = r"classifier\.weight"

TRANSFORMERS_MAPS: tuple[KeyMap, ...] = (
    KeyMap(
        "transformers' DeiT with one classifier",
        marks=(*VIT_MARKS, DISTILLATION, CLASSIFIER),
        names=((DISTILLATION, "reg_token"), *VIT_NAMES),
        left_out=FOR_VIT,
        describe=to_timm.deit,
    ),
    KeyMap(
        "transformers' DeiT",
        marks=(*VIT_MARKS, DISTILLATION),
        names=DEIT_NAMES,
        left_out=FOR_VIT,
        describe=to_timm.distilled,
    ),
    KeyMap(
        "transformers' BEiT",
        marks=(
            r"(?:beit\.)?embeddings\.cls_token",
            r".*layers?\.\d+\..*",
            rf".*(?:\.lambda_1|{TABLE}|pooler\.layernorm\.weight)",
        ),
        names=BEIT_NAMES,
        left_out=(MASK_TOKEN, INDEX, (r"lm_head\..*", "the head that predicts visual tokens")),
        describe=to_timm.beit,
    ),
    KeyMap(
        "transformers' ViTMAE",
        marks=(*VIT_MARKS, r"decoder\.decoder_embed\.weight"),
        names=VIT_NAMES,
        left_out=(MASK_TOKEN, (r"decoder\..*", "the decoder of masked autoencoding")),
        describe=to_timm.mae,
    ),
    KeyMap(
        "transformers' ViT",
        marks=VIT_MARKS,
        names=VIT_NAMES,
        left_out=FOR_VIT,
        describe=to_timm.vit,
    ),
    KeyMap(
        "transformers' DINOv2 with registers",
        marks=(*DINO_MARKS, DINO + r"embeddings\.register_tokens"),
        unless=DINOV3_MARKS[:1],
        prepare=fold_registers,
        names=DINOV2_NAMES,
        left_out=(*FOR_DINO, DINOV2_CLASSIFIER),
        describe=to_timm.dinov2,
    ),
    KeyMap(
        "transformers' DINOv2",
        marks=DINO_MARKS,
        unless=DINOV3_MARKS[:1],
        names=DINOV2_NAMES,
        left_out=(*FOR_DINO, DINOV2_CLASSIFIER),
        describe=to_timm.dinov2,
    ),
    KeyMap(
        "transformers' DINOv3 (SwiGLU)",
        marks=(*DINOV3_MARKS, GATE),
        prepare=drop_empty_registers,
        names=dinov3_names(GATED),
        left_out=FOR_DINO,
        describe=to_timm.dinov3,
    ),
    KeyMap(
        "transformers' DINOv3",
        marks=DINOV3_MARKS,
        prepare=drop_empty_registers,
        names=dinov3_names(NOT_GATED),
        left_out=FOR_DINO,
        describe=to_timm.dinov3,
    ),
    KeyMap(
        "transformers' CLIP with a classifier",
        marks=(*TOWER_MARKS, CLASS_EMBEDDING, CLASSIFIER),
        names=TOWER_NAMES,
        left_out=(
            *TEXT,
            (TOWER + r"post_layernorm\..*", "the classifier reads the patches without it"),
        ),
        reshape=as_batch,
        describe=to_timm.clip,
    ),
    KeyMap(
        "transformers' CLIP",
        marks=(*TOWER_MARKS, CLASS_EMBEDDING),
        names=TOWER_NAMES,
        left_out=TEXT,
        reshape=as_batch,
        describe=to_timm.clip,
    ),
    KeyMap(
        "transformers' SigLIP with a classifier",
        marks=(*TOWER_MARKS, CLASSIFIER),
        names=TOWER_NAMES,
        left_out=(
            *TEXT,
            (TOWER + r"head\..*", "the classifier reads the mean of the patches without it"),
        ),
        reshape=as_batch,
        describe=to_timm.siglip,
    ),
    KeyMap(
        "transformers' SigLIP",
        marks=TOWER_MARKS,
        prepare=split_probe,
        names=TOWER_NAMES,
        left_out=TEXT,
        reshape=as_batch,
        describe=to_timm.siglip,
    ),
)
