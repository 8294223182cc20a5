"""Key maps of DINOv2's and DINOv3's own files.

timm has converters for both, which are not used: they also resample positions to the model they are given, and
one drops the biases of queries and values where that model has none.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...models.errors import CheckpointError, Json
from ..weights import Weights
from .keymap import KeyMap
from .normalization import IMAGENET, imagenet, normalized

MASK_TOKEN = ("mask_token", "the mask token of masked image modelling")
BLOCK = r"blocks\.(?:\d+\.)?(\d+)\."
"""Blocks are numbered through, also inside the chunks that sharded training makes: `blocks.1.6.` is block 6."""
ROPE_BASE = 100.0


def _fold_class_position(weights: Weights) -> Weights:
    """Add the class token's own position to the token: with registers, timm's positions are the patches' only."""
    tensors = dict(weights.tensors)
    position, token = tensors.get("pos_embed"), tensors.get("cls_token")
    if "register_tokens" not in tensors or position is None or token is None:
        return weights
    if position.ndim != 3 or token.shape != (1, 1, position.shape[2]):
        raise CheckpointError(
            f"{weights.origin}: cls_token {tuple(token.shape)} and pos_embed {tuple(position.shape)} do not fit"
        )
    tensors["cls_token"], tensors["pos_embed"] = token + position[:, :1], position[:, 1:]
    return replace(weights, tensors=tensors)


def _cut_biases(weights: Weights) -> Weights:
    """`qkv.bias` as timm keeps it, for queries and values: the file masks the keys' part to zero."""
    tensors = dict(weights.tensors)
    for name in [name for name in tensors if name.endswith(".attn.qkv.bias")]:
        bias = tensors.pop(name)
        mask = tensors.get(f"{name}_mask", torch.ones_like(bias))
        if bias.ndim != 1 or bias.numel() % 3 or mask.numel() != bias.numel():
            raise CheckpointError(f"{weights.origin}: {name} is {tuple(bias.shape)}, not three equal parts")
        query, key, value = (bias * mask.reshape(-1)).chunk(3)
        if bool(key.any()):
            raise CheckpointError(
                f"{weights.origin}: {name} has a bias on the keys, for which timm has no place"
            )
        tensors[name.replace("qkv.bias", "q_bias")] = query
        tensors[name.replace("qkv.bias", "v_bias")] = value
    return _check_periods(replace(weights, tensors=tensors))


def _check_periods(weights: Weights) -> Weights:
    """timm computes the periods of the rotary embedding; those of the file must be these."""
    periods = weights.tensors.get("rope_embed.periods")
    if periods is None:
        return weights
    expected = ROPE_BASE ** (torch.arange(periods.numel(), dtype=torch.float32) / max(periods.numel(), 1))
    found = periods.flatten().float()
    if not torch.allclose(found, expected, rtol=1e-2):
        raise CheckpointError(
            f"{weights.origin}: rope_embed.periods are not those of base {ROPE_BASE:g}, which timm's DINOv3 has"
        )
    if torch.allclose(found, expected, rtol=1e-6):
        return weights
    note = "rotary periods: computed in float32; the file's are rounded, and its own features differ a little"
    return replace(weights, notes=(*weights.notes, note))


def _describe_v3(weights: Weights, config: Json) -> Weights:
    arguments = {"global_pool": "token", **weights.model_args}
    reason = "ImageNet's, as DINOv3 trains on photographs (its satellite models have their own)"
    return normalized(replace(weights, model_args=arguments), IMAGENET, reason)


DINO_MAPS: tuple[KeyMap, ...] = (
    KeyMap(
        "DINOv3's backbone",
        marks=(r"blocks\.0\.ls1\.gamma", r"storage_tokens|rope_embed\.periods"),
        unless=("pos_embed",),
        prepare=_cut_biases,
        names=(
            (r"(blocks\.\d+\.)ls([12])\.gamma", r"\1gamma_\2"),
            (r"(blocks\.\d+\.mlp\.)w1\.(.+)", r"\1fc1_g.\2"),
            (r"(blocks\.\d+\.mlp\.)w2\.(.+)", r"\1fc1_x.\2"),
            (r"(blocks\.\d+\.mlp\.)w3\.(.+)", r"\1fc2.\2"),
            ("storage_tokens", "reg_token"),
        ),
        left_out=(
            MASK_TOKEN,
            (r"rope_embed\.periods", "timm computes it"),
            (r".+\.bias_mask", "applied to the bias"),
            (r"local_cls_norm\..+", "used in training only"),
        ),
        describe=_describe_v3,
    ),
    KeyMap(
        "DINOv2's backbone",
        marks=("pos_embed", BLOCK + r"ls1\.gamma", "mask_token|register_tokens"),
        prepare=_fold_class_position,
        names=(
            (BLOCK + r"mlp\.w12\.(.+)", r"blocks.\1.mlp.fc1.\2"),
            (BLOCK + r"mlp\.w3\.(.+)", r"blocks.\1.mlp.fc2.\2"),
            (BLOCK + r"(.+)", r"blocks.\1.\2"),
            ("register_tokens", "reg_token"),
        ),
        left_out=(MASK_TOKEN,),
        describe=imagenet("DINOv2 trains"),
    ),
)
