"""Find the architecture of weights that do not name it: vision transformers of published widths and depths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from timm.models import is_model
from torch import Tensor

from ..models.errors import CheckpointError, JsonDict
from .report import some
from .weights import Weights

Named = tuple[str, JsonDict]
SIZES = {
    192: ("tiny", 12),
    384: ("small", 12),
    512: ("medium", 12),
    768: ("base", 12),
    1024: ("large", 24),
    1152: ("so400m", 27),
    1280: ("huge", 32),
    1408: ("giant", 40),
    1536: ("giant", 40),
    1664: ("gigantic", 48),
    4096: ("7b", 40),
}
"""By width: timm's name and the depth. No weight shows the number of heads: timm's name does."""

LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
PLAIN = frozenset(f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias"))
"""The tensors of a block of a plain vision transformer, exactly."""
SCALED = PLAIN | {"ls1.gamma", "ls2.gamma"}
WITHOUT_KEY_BIAS = PLAIN - {"attn.qkv.bias"} | {"gamma_1", "gamma_2"}
BIASES = frozenset({"attn.q_bias", "attn.v_bias"})
TABLE = frozenset({"attn.relative_position_bias_table"})
GATED = frozenset(f"mlp.fc1_{gate}.{kind}" for gate in "gx" for kind in ("weight", "bias"))
FIRST = frozenset({"mlp.fc1.weight", "mlp.fc1.bias"})
FAMILIES = (
    "MAE, DeiT and DeiT III, DINO, DINOv2, DINOv3, MoCo-v3, iBOT, BEiT, Google's flax ViTs, attention transfer, "
    "EcoFormer, PVT, LIT, LITv2, AttnZero's PVT and Swin in their published sizes, Hugging Face's ViTs, timm's own"
)


def infer_architecture(weights: Weights) -> Named:
    """timm's name and arguments of a ViT by its parts and widths, at any patch size.

    Raises CheckpointError: it lacks blocks, is no vision transformer, or could be of several architectures, and
    then asks for it.
    """
    tensors = weights.tensors
    numbers = {int(key.split(".")[1]) for key in tensors if key.startswith("blocks.") and _number(key)}
    if not numbers:
        raise CheckpointError(
            f"{weights.origin} is of no supported family: it holds {some(tensors, 3)}; supported are {FAMILIES}"
        )
    depth = 1 + max(numbers)
    absent = [f"blocks.{number}" for number in range(depth) if number not in numbers]
    if absent:
        raise CheckpointError(f"{weights.origin} is not whole: of {depth} blocks it lacks {some(absent)}")
    patch = tensors.get("patch_embed.proj.weight")
    block = frozenset(key.removeprefix("blocks.0.") for key in tensors if key.startswith("blocks.0."))
    namer = _namer(block, tensors)
    if patch is None or patch.ndim != 4 or namer is None:
        raise CheckpointError(_question(weights, "its keys are not those of a plain ViT"))
    width, channels, *size = patch.shape
    named = namer(weights, width, size[0]) if size[0] == size[1] else None
    if named is None or depth != SIZES[width][1]:
        raise CheckpointError(_question(weights, f"width {width} and depth {depth} are of no published ViT"))
    architecture, arguments = named
    return architecture, arguments | ({"in_chans": channels} if channels != 3 else {})


def _number(key: str) -> bool:
    return key.split(".")[1].isdecimal()


def _namer(
    block: frozenset[str], tensors: Mapping[str, Tensor]
) -> Callable[[Weights, int, int], Named | None] | None:
    """Return timm's name of a model by width and patch size, by the tensors of a block and by the tokens."""
    if "norm_pre.weight" in tensors:
        return None
    if block == SCALED:
        return _scaled if {"cls_token", "pos_embed"} <= tensors.keys() else None
    if block in (WITHOUT_KEY_BIAS | BIASES, WITHOUT_KEY_BIAS | BIASES | TABLE):
        return _rotary if "reg_token" in tensors else _beit
    if block in (
        WITHOUT_KEY_BIAS,
        WITHOUT_KEY_BIAS - FIRST | GATED,
        WITHOUT_KEY_BIAS - FIRST | GATED | BIASES,
    ):
        return _rotary if "reg_token" in tensors else None
    return _plain if block == PLAIN and "reg_token" not in tensors and "pos_embed" in tensors else None


def _plain(weights: Weights, width: int, patch: int) -> Named | None:
    """ViT, DeiT with its distillation token, and SigLIP's tower; without a class token only if that is known."""
    size = _size(width)
    if "dist_token" in weights.tensors:
        return _at_patch(f"deit_{size}_distilled_patch{{}}_224", patch, 16)
    if "attn_pool.latent" in weights.tensors:
        sizes = (f"vit_{size}_patch{patch}_siglip_{side}" for side in (224, 256, 384, 512))
        return next(((name, {}) for name in sizes if is_model(name)), None)
    if "cls_token" not in weights.tensors and weights.model_args.get("class_token") is not False:
        return None
    return _at_patch(f"vit_{size}_patch{{}}_224", patch, 16 if width < 1280 else 14)


def _scaled(weights: Weights, width: int, patch: int) -> Named | None:
    """DeiT III where no position is the class token's, else DINOv2, with or without registers."""
    tensors = weights.tensors
    patches, registers = _tokens(tensors.get("pos_embed")), _tokens(tensors.get("reg_token"))
    if not registers and math.isqrt(patches) ** 2 == patches:
        return _at_patch(f"deit3_{_size(width)}_patch{{}}_224", patch, 16 if width < 1280 else 14)
    middle = "_reg4" if registers else ""
    named = _at_patch(f"vit_{_size(width)}_patch{{}}{middle}_dinov2", patch, 14)
    if named is not None and registers not in (0, 4):
        named[1]["reg_tokens"] = registers
    return named


def _beit(weights: Weights, width: int, patch: int) -> Named | None:
    return _at_patch(f"beit_{_size(width)}_patch{{}}_224", patch, 16)


def _rotary(weights: Weights, width: int, patch: int) -> Named | None:
    """DINOv3: `plus` are the gated ones, `qkvb` those with biases on queries and values."""
    tensors = weights.tensors
    gated, biased = "blocks.0.mlp.fc1_g.weight" in tensors, "blocks.0.attn.q_bias" in tensors
    if "pos_embed" in tensors:
        return None
    plus = "_plus" if gated and width != 4096 else ""
    biases = "_qkvb" if biased else ""
    named = _at_patch(f"vit_{_size(width)}{plus}_patch{{}}_dinov3{biases}", patch, 16)
    registers = _tokens(tensors.get("reg_token"))
    if named is not None and registers != 4:
        named[1]["num_reg_tokens"] = registers
    return named


def _tokens(token_1ND: Tensor | None) -> int:
    return token_1ND.shape[1] if token_1ND is not None and token_1ND.ndim == 3 else 0


def _size(width: int) -> str:
    return SIZES[width][0] if width in SIZES else "?"


def _at_patch(template: str, patch: int, usual: int) -> Named | None:
    """timm's name at this patch size, or that at the usual one with the size as an argument."""
    if is_model(template.format(patch)):
        return template.format(patch), {}
    return (template.format(usual), {"patch_size": patch}) if is_model(template.format(usual)) else None


def _question(weights: Weights, reason: str) -> str:
    return (
        f"{weights.origin} does not say its architecture and {reason}: give its timm name as teacher.model "
        "(and teacher.model_args where it was built with some)"
    )
