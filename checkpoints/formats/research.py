"""Key maps of files that papers published.

Those that name every part as timm does have a row too where their keys show the family, for what timm has no
place for and for the images that they were trained on.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ...models.errors import CheckpointError, Json, JsonDict
from ..fit import find_grid
from ..weight_files import Weights
from .flax import FLAX_MAPS
from .keymap import BEIT2_NOTE, IMAGENET, INCEPTION, NOTE, KeyMap, imagenet, normalized
from .lit_keys import ECOFORMER_MAPS, LIT_MAPS

# Map the keys of BEiT and BEiTv2, whose parts have timm's names.

TABLE = "relative_position_bias_table"
SHARED = f"rel_pos_bias.{TABLE}"
OWN = f"blocks.0.attn.{TABLE}"
BEIT2 = "beitv2_base_patch16_224.in1k_ft_in1k"


def _describe(weights: Weights, config: Json) -> Weights:
    """Return where the positions are, how the tokens are pooled, at which size; and which of the two BEiTs it is."""
    keys = weights.tensors.keys()
    arguments: JsonDict = {
        "use_abs_pos_emb": "pos_embed" in keys,
        "use_rel_pos_bias": OWN in keys,
        "use_shared_rel_pos_bias": SHARED in keys,
        "global_pool": "avg" if "fc_norm.weight" in keys else "token",
    }
    size = _img_size(weights)
    if size is not None:
        arguments["img_size"] = size
    return _normalized(replace(weights, model_args={**arguments, **weights.model_args}))


def _normalized(weights: Weights) -> Weights:
    second = BEIT2_NOTE in weights.notes or any(key.startswith("cls_pt_") for key in weights.left_out)
    if second:
        return normalized(weights, IMAGENET, BEIT2_NOTE.removeprefix(NOTE))
    reason = f"one half, as BEiT trains; if this is BEiTv2, give model={BEIT2}, which has ImageNet's"
    return normalized(weights, INCEPTION, reason)


def _img_size(weights: Weights) -> tuple[int, int] | None:
    """Return the size that a table of (2 s - 1)² + 3 offsets was trained at, where s is the side of the square grid."""
    table = weights.tensors.get(OWN, weights.tensors.get(SHARED))
    patch = weights.tensors.get("patch_embed.proj.weight")
    if table is None or patch is None or table.ndim != 2 or patch.ndim != 4:
        return None
    side = math.isqrt(max(table.shape[0] - 3, 0))
    if side % 2 == 0 or side * side + 3 != table.shape[0]:
        return None
    grid = (side + 1) // 2
    return grid * int(patch.shape[2]), grid * int(patch.shape[3])


BEIT_MAPS: tuple[KeyMap, ...] = (
    KeyMap(
        "BEiT",
        marks=("cls_token", r"blocks\.0\.attn\.q_bias", rf"(?:blocks\.0\.attn|rel_pos_bias)\.{TABLE}"),
        left_out=(
            ("mask_token", "the mask token of masked image modelling"),
            (r"lm_head\..+", "the head of masked image modelling"),
            (r"cls_pt_(?:layers|norm|lm_head)\..+", "the second head of BEiTv2's pre-training"),
            (r".+\.relative_position_index", "timm computes it"),
        ),
        describe=_describe,
    ),
)


# Key maps of DINOv2's and DINOv3's own files.
#
# timm has converters for both, which are not used: they also resample positions to the model they are given, and
# one drops the biases of queries and values where that model has none.

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


# MoCo-v3, whose small ViT has twice the usual heads: no tensor's shape says so, but its fixed positions do.

PROJECTION = "the projection head of MoCo"
SMALL_WIDTH = 384
SMALL_HEADS = 12


def describe_moco(weights: Weights, config: Json) -> Weights:
    """ImageNet's statistics, and the 12 heads of the small model."""
    return _with_heads(normalized(weights, IMAGENET, "ImageNet's, as MoCo-v3 trains"))


def describe_plain(weights: Weights, config: Json) -> Weights:
    """Return a plain ViT: what the file says of it; without a head, and without a word, ImageNet's statistics."""
    if _has_moco_positions(weights.tensors["pos_embed"]):
        return describe_moco(weights, config)
    if "head.weight" in weights.tensors or any(note.startswith(NOTE) for note in weights.notes):
        return weights
    reason = "ImageNet's assumed, for plain ViTs without a head are self-supervised ones (DINO, iBOT, MAE)"
    return normalized(weights, IMAGENET, reason)


def _with_heads(weights: Weights) -> Weights:
    if weights.tensors["cls_token"].shape[-1:] != (SMALL_WIDTH,):
        return weights
    note = f"heads: {SMALL_HEADS}, as MoCo-v3's small ViT has"
    return replace(
        weights,
        model_args={"num_heads": SMALL_HEADS, **weights.model_args},
        notes=(*weights.notes, note),
    )


def _has_moco_positions(position_1ND: Tensor) -> bool:
    """Return whether these are MoCo-v3's sines and cosines: its first half follows the rows; MAE's follows the
    columns."""
    grid = find_grid(position_1ND.shape[1] - 1, None) if position_1ND.ndim == 3 else None
    if grid is None or grid[0] < 2 or position_1ND.shape[2] % 4:
        return False
    quarter = position_1ND.shape[2] // 4
    frequency_Q = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    row_N = torch.arange(grid[0]).repeat_interleave(grid[1])
    angle_NQ = row_N[:, None] * frequency_Q
    expected_NC = torch.cat([angle_NQ.sin(), angle_NQ.cos()], dim=1)
    return torch.allclose(position_1ND[0, 1:, : 2 * quarter].float(), expected_NC, atol=1e-3)


MASKED_TOKEN = (r"mask(?:ed)?_(?:token|embed)", "the mask token of masked image modelling")
PLAIN = ("cls_token", "pos_embed", r"blocks\.0\.attn\.qkv\.bias")
OTHER_THAN_PLAIN = (
    r"blocks\.0\.(?!norm[12]\.|attn\.qkv\.|attn\.proj\.|mlp\.fc[12]\.).+",
    r"norm_pre\..+|(?:dist|reg)_token|register_tokens|attn_pool\..+",
)

PLAIN_MAPS: tuple[KeyMap, ...] = (
    KeyMap(
        "MAE's autoencoder",
        marks=(*PLAIN, r"decoder_pred\.weight"),
        left_out=((r"mask_token|decoder_.+", "the decoder of masked autoencoding"),),
        describe=imagenet("MAE trains"),
    ),
    KeyMap(
        "an encoder of MoCo-v3",
        marks=(*PLAIN, r"head\.0\.weight", r"head\.1\.running_mean"),
        left_out=((r"head\.\d+\..+", PROJECTION),),
        describe=describe_moco,
    ),
    KeyMap(
        "iBOT's backbone",
        marks=(*PLAIN, "masked_embed"),
        left_out=(MASKED_TOKEN,),
        describe=imagenet("iBOT trains"),
    ),
    KeyMap(
        "a distilled DeiT",
        marks=(*PLAIN, "dist_token"),
        describe=imagenet("DeiT trains"),
    ),
    KeyMap(
        "DeiT III",
        marks=("cls_token", "pos_embed", r"blocks\.0\.attn\.qkv\.bias", r"blocks\.0\.gamma_1"),
        unless=(r"blocks\.0\.attn\.proj_l\..+|blocks_token_only\..+",),
        names=((r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),),
        describe=imagenet("DeiT trains"),
    ),
    KeyMap(
        "a plain ViT",
        marks=(*PLAIN, r"(?:fc_)?norm\.weight"),
        unless=OTHER_THAN_PLAIN,
        left_out=(MASKED_TOKEN,),
        describe=describe_plain,
    ),
)

RESEARCH_MAPS: tuple[KeyMap, ...] = (
    *FLAX_MAPS,
    *BEIT_MAPS,
    *DINO_MAPS,
    *ECOFORMER_MAPS,
    *LIT_MAPS,
    *PLAIN_MAPS,
)
