"""The architecture of weights that do not name their own: plain vision transformers of published widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import is_model
from torch import Tensor

from ..models.errors import CheckpointError
from .weights import Weights

SIZES = {
    192: ("tiny", 12, 3),
    384: ("small", 12, 6),
    768: ("base", 12, 12),
    1024: ("large", 24, 16),
    1280: ("huge", 32, 16),
}
"""By width: timm's name, depth, heads. The number of heads is nowhere in the weights."""

PLAIN = frozenset(
    f"{module}.{kind}"
    for module in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
)
"""What a block of a plain vision transformer holds, no more and no less."""


def infer_architecture(weights: Weights) -> tuple[str, dict[str, Any]]:
    """timm name and arguments of a plain ViT-Ti/S/B/L/H by its widths: MAE, DeiT, and any patch size.

    Raises CheckpointError asking for the architecture where the weights could be of several.
    """
    tensors = weights.tensors
    patch = tensors.get("patch_embed.proj.weight")
    if patch is None or patch.ndim != 4 or not _plain_blocks(tensors):
        raise CheckpointError(_question(weights, "its keys are not those of a plain ViT"))
    width, channels, *patch_size = patch.shape
    depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
    if width not in SIZES or depth != SIZES[width][1] or patch_size[0] != patch_size[1]:
        raise CheckpointError(_question(weights, f"width {width} and depth {depth} are of no published ViT"))
    name = SIZES[width][0]
    architecture = f"vit_{name}_patch{patch_size[0]}_224"
    arguments: dict[str, Any] = {}
    if not is_model(architecture):
        architecture = f"vit_{name}_patch{14 if name == 'huge' else 16}_224"
        arguments["patch_size"] = patch_size[0]
    return architecture, arguments | ({"in_chans": channels} if channels != 3 else {})


def _plain_blocks(tensors: Mapping[str, Tensor]) -> bool:
    first = {key.removeprefix("blocks.0.") for key in tensors if key.startswith("blocks.0.")}
    others = ("reg_token", "norm_pre.weight", "dist_token", "attn_pool.latent")
    plain = first == PLAIN and "cls_token" in tensors and "pos_embed" in tensors
    return plain and not any(key in tensors for key in others)


def _question(weights: Weights, reason: str) -> str:
    return (
        f"{weights.origin} does not say its architecture and {reason}: give its timm name as teacher.model "
        "(and teacher.model_args where it was built with some)"
    )
