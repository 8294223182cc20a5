"""Map the keys of BEiT and BEiTv2, whose parts have timm's names."""

from __future__ import annotations

import math
from dataclasses import replace

from ...models.errors import Json, JsonDict
from ..weights import Weights
from .containers import BEIT2_NOTE
from .keymap import KeyMap
from .normalization import IMAGENET, INCEPTION, NOTE, normalized

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
