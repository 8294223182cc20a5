"""Map the keys of Google's flax ViTs: archives of vit_jax and big_vision, and SigLIP's image tower.

Kernels are (in, out) there, those of queries, keys and values (C, H, D), and the patches' (height, width, in, out).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...models.errors import CheckpointError, Json, JsonDict
from ..weight_files import Weights
from .keymap import INCEPTION, KeyMap, normalized

TREE = r"(?:opt/target/|params/)?(?:img/)?"
BLOCK = TREE + r"Transformer/encoderblock_(\d+)/"
STACKED = re.compile(rf"({TREE}Transformer/encoderblock)/(.+)")
ATTENTION = r"MultiHeadDotProductAttention_[01]/"
POOL = TREE + "MAPHead_0/"
NO_REPRESENTATION = "timm has no representation layer"


def _pairs(flax: str, timm: str) -> tuple[tuple[str, str], ...]:
    """Return rules for a layer's weight (kernel of a dense layer, scale of a norm) and bias."""
    return (rf"{flax}/(?:kernel|scale)", f"{timm}.weight"), (rf"{flax}/bias", f"{timm}.bias")


def _thirds() -> Iterator[tuple[str, str]]:
    for name in ("query", "key", "value"):
        for flax, timm in _pairs(BLOCK + ATTENTION + name, r"blocks.\1.attn.qkv"):
            yield flax, f"{timm}[{name}]"


NAMES: tuple[tuple[str, str], ...] = (
    *_thirds(),
    *_pairs(BLOCK + ATTENTION + "out", r"blocks.\1.attn.proj"),
    *_pairs(BLOCK + "LayerNorm_0", r"blocks.\1.norm1"),
    *_pairs(BLOCK + "LayerNorm_[12]", r"blocks.\1.norm2"),
    *_pairs(BLOCK + "MlpBlock_[03]/Dense_0", r"blocks.\1.mlp.fc1"),
    *_pairs(BLOCK + "MlpBlock_[03]/Dense_1", r"blocks.\1.mlp.fc2"),
    *_pairs(TREE + "embedding", "patch_embed.proj"),
    *_pairs(TREE + "Transformer/encoder_norm", "norm"),
    *_pairs(TREE + "head", "head"),
    (TREE + "cls", "cls_token"),
    (TREE + r"(?:Transformer/)?(?:posembed_input/)?pos_embedding", "pos_embed"),
    (POOL + "probe", "attn_pool.latent"),
    *_pairs(POOL + ATTENTION + "query", "attn_pool.q"),
    *_pairs(POOL + ATTENTION + "key_value", "attn_pool.kv"),
    *_pairs(POOL + ATTENTION + "out", "attn_pool.proj"),
    *_pairs(POOL + "LayerNorm_0", "attn_pool.norm"),
    *_pairs(POOL + "MlpBlock_0/Dense_0", "attn_pool.mlp.fc1"),
    *_pairs(POOL + "MlpBlock_0/Dense_1", "attn_pool.mlp.fc2"),
)
SPLIT_HEADS = re.compile(r"(?:.+\.attn\.qkv|attn_pool\.(?:q|kv))\.(?:weight|bias)")
MERGED_HEADS = re.compile(r"(?:.+\.attn|attn_pool)\.proj\.weight")


def _prepare(weights: Weights) -> Weights:
    tensors = _pooled(_unstacked(weights.tensors, weights.origin), weights.origin)
    tensors, left_out = _without_representation(tensors)
    query = next(
        (t for key, t in tensors.items() if re.fullmatch(BLOCK + ATTENTION + "query/kernel", key)), None
    )
    if query is None or query.ndim != 3:
        raise CheckpointError(
            f"{weights.origin} is not whole: its query kernels are not (width, heads, head width)"
        )
    arguments: JsonDict = {"num_heads": query.shape[1], "act_layer": "gelu_tanh"}
    return replace(
        weights,
        tensors=tensors,
        left_out={**weights.left_out, **left_out},
        model_args={**arguments, **weights.model_args},
        notes=(*weights.notes, "activation: the tanh form of GELU, which flax computes"),
    )


def _unstacked(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Separate blocks that were trained in a scan, which has one tensor (depth, …) for all."""
    apart: dict[str, Tensor] = {}
    depths: set[int] = set()
    for key, tensor in tensors.items():
        stacked = STACKED.fullmatch(key)
        if stacked is None:
            apart[key] = tensor
            continue
        depths.add(tensor.shape[0] if tensor.ndim else 0)
        apart |= {
            f"{stacked[1]}_{i}/{stacked[2]}": layer for i, layer in enumerate(tensor if tensor.ndim else ())
        }
    if len(depths) > 1:
        raise CheckpointError(f"{origin} is damaged: its stacked blocks are of different depths")
    return apart


def _pooled(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Return keys and values of the attention pooling as one tensor, which timm has them in."""
    joined = dict(tensors)
    for key in [key for key in tensors if re.fullmatch(POOL + ATTENTION + "key/.+", key)]:
        partner = key.replace("/key/", "/value/")
        first, second = joined.pop(key), joined.pop(partner, None)
        if second is None or second.shape != first.shape or not first.ndim:
            raise CheckpointError(f"{origin} is not whole: {partner} does not fit {key}")
        joined[key.replace("/key/", "/key_value/")] = torch.cat([first, second])
    return joined


def _without_representation(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Leave out a head on top of a representation layer, without which it is of no use."""
    layer = [key for key in tensors if re.fullmatch(TREE + "pre_logits/.+", key)]
    head = [key for key in tensors if re.fullmatch(TREE + "head/.+", key)] if layer else []
    left_out = dict.fromkeys(layer, NO_REPRESENTATION)
    left_out |= dict.fromkeys(head, f"a head on a representation layer; {NO_REPRESENTATION}")
    return {key: tensor for key, tensor in tensors.items() if key not in left_out}, left_out


def _reshape(name: str, tensor: Tensor) -> Tensor:
    """Return a flax tensor as timm keeps it: out before in, heads side by side."""
    if SPLIT_HEADS.fullmatch(name) and tensor.ndim == 3:
        pieces = {"qkv": 3, "kv": 2, "q": 1}[name.split(".")[-2]]
        kernels_PCHD = tensor.reshape(pieces, tensor.shape[0] // pieces, *tensor.shape[1:])
        return kernels_PCHD.flatten(2).transpose(1, 2).flatten(0, 1).contiguous()
    if SPLIT_HEADS.fullmatch(name):
        return tensor.flatten()
    if MERGED_HEADS.fullmatch(name) and tensor.ndim == 3:
        return tensor.flatten(0, 1).T.contiguous()
    if name == "patch_embed.proj.weight" and tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1).contiguous()
    return tensor.T.contiguous() if name.endswith(".weight") and tensor.ndim == 2 else tensor


def _describe(weights: Weights, config: Json) -> Weights:
    """Return which tokens there are and how they are pooled; values from -1 to 1."""
    tensors = weights.tensors
    arguments: JsonDict = {}
    if "cls_token" not in tensors:
        pooled = "attn_pool.latent" in tensors
        arguments = {"class_token": False, "global_pool": "map" if pooled else "avg", "fc_norm": False}
    elif "pos_embed" in tensors and tensors["pos_embed"].ndim == 3:
        patches = tensors["pos_embed"].shape[1]
        arguments = {"no_embed_class": math.isqrt(patches) ** 2 == patches}
    weights = replace(weights, model_args={**arguments, **weights.model_args})
    return normalized(weights, INCEPTION, "one half, as Google's ViTs train")


FLAX_MAPS: tuple[KeyMap, ...] = (
    KeyMap(
        "Google's ViT (flax)",
        marks=(
            TREE + "embedding/kernel",
            TREE + r"Transformer/encoderblock(?:_\d+)?/MultiHeadDotProductAttention_[01]/query/kernel",
        ),
        prepare=_prepare,
        names=NAMES,
        reshape=_reshape,
        left_out=(
            (r"opt/(?!target/).+", "the state of the optimizer"),
            (r"params/(?:txt/.+|t|b)", "the text tower and the loss"),
        ),
        describe=_describe,
    ),
)
