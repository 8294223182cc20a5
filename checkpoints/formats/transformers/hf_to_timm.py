"""Turn the tensors and the config.json of a transformers family into timm's architecture and arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ....models.errors import Json, JsonDict
from ...weights import Weights
from ..keymap import Describe
from .hf_config import Config, tower_config
from .hf_families import Family, activation, described, only_activation, without_bias
from .lineages import Lineage
from .sizes import matrix

PLAIN_SIZES = ("base", "tiny", "small", "large", "huge", "giant", "gigantic")
VIT = Family(Lineage("vit_{size}_patch{patch}_{image}", PLAIN_SIZES, (16, 14, 32, 8)), "one half each")
MAE = replace(VIT, statistics="ImageNet's")
DISTILLED = Family(
    Lineage("deit_{size}_distilled_patch{patch}_{image}", ("base", "tiny", "small")), "ImageNet's", prefix=2
)
DEIT = replace(VIT, statistics="ImageNet's", prefix=2)
BEIT = Family(Lineage("beit_{size}_patch{patch}_{image}", ("base", "large")), "one half each")
DINOV2_SIZES = ("base", "small", "large")
DINOV3_SIZES = {False: ("base", "small", "large"), True: ("small_plus", "huge_plus", "7b")}
CLIP_SIZES = ("base", "large", "huge", "giant", "gigantic")
SIGLIP_SIZES = ("base", "large", "so400m", "giantopt")
IMAGENET_TYPES = ("vit_mae", "vit_msn", "deit")

Tell = Callable[[Weights, Config], Weights]


def _describe(tell: Tell) -> Describe:
    def describe(weights: Weights, config: Json) -> Weights:
        return tell(weights, tower_config(weights, config))

    return describe


@_describe
def vit(weights: Weights, config: Config) -> Weights:
    family = MAE if config.values.get("model_type") in IMAGENET_TYPES else VIT
    return described(weights, config, family, activation(config, VIT, "gelu") | without_bias(weights, config))


@_describe
def mae(weights: Weights, config: Config) -> Weights:
    return described(weights, config, MAE, activation(config, MAE, "gelu") | without_bias(weights, config))


@_describe
def distilled(weights: Weights, config: Config) -> Weights:
    arguments = activation(config, DISTILLED, "gelu") | without_bias(weights, config)
    return described(weights, config, DISTILLED, arguments)


@_describe
def deit(weights: Weights, config: Config) -> Weights:
    arguments = {"reg_tokens": 1, **activation(config, DEIT, "gelu"), **without_bias(weights, config)}
    known = described(weights, config, DEIT, arguments)
    note = "the distillation token is a register here: the classifier reads the class token alone"
    return replace(known, notes=(*known.notes, note))


@_describe
def beit(weights: Weights, config: Config) -> Weights:
    only_activation(config, BEIT, "gelu")
    tensors = weights.tensors
    found: JsonDict = {
        "use_abs_pos_emb": "pos_embed" in tensors,
        "use_rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in tensors,
        "use_shared_rel_pos_bias": "rel_pos_bias.relative_position_bias_table" in tensors,
        "init_values": 0.1 if "blocks.0.gamma_1" in tensors else 0.0,
        "global_pool": "token" if "norm.weight" in tensors else "avg",
    }
    published = {
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": True,
        "use_shared_rel_pos_bias": False,
        "init_values": 0.1,
        "global_pool": "avg",
    }
    config.must_have("use_absolute_position_embeddings", found["use_abs_pos_emb"])
    config.must_have("use_relative_position_bias", found["use_rel_pos_bias"])
    config.must_have("use_shared_relative_position_bias", found["use_shared_rel_pos_bias"])
    arguments = {key: value for key, value in found.items() if value != published[key]}
    return described(weights, config, BEIT, arguments | without_bias(weights, config, "attn.q_bias"))


@_describe
def dinov2(weights: Weights, config: Config) -> Weights:
    rows, _ = matrix(weights, "blocks.0.mlp.fc1.weight")
    gated = rows == 2 * matrix(weights, "blocks.0.mlp.fc2.weight")[1]
    count = _registers(weights, config)
    template = "vit_{size}_patch{patch}_reg4_dinov2" if count else "vit_{size}_patch{patch}_dinov2"
    lineage = Lineage(template, ("giant packed",) if gated else DINOV2_SIZES, (14,))
    family = Family(lineage, "ImageNet's", 1e-6, prefix=0 if count else 1, hidden_setting=None)
    arguments: JsonDict = {"reg_tokens": count} if count not in (0, 4) else {}
    if not gated:
        arguments |= activation(config, family, "gelu")
    return described(weights, config, family, arguments | without_bias(weights, config))


@_describe
def dinov3(weights: Weights, config: Config) -> Weights:
    tensors = weights.tensors
    first = "blocks.0.mlp.fc1_g.weight"
    gated = first in tensors
    biased = "blocks.0.attn.q_bias" in tensors
    lineage = Lineage(f"vit_{{size}}_patch{{patch}}_dinov3{'_qkvb' if biased else ''}", DINOV3_SIZES[gated])
    family = Family(lineage, "ImageNet's", 1e-5, heads=6)
    _check_dinov3(weights, config)
    only_activation(config, family, "silu" if gated else "gelu")
    count = _registers(weights, config)
    arguments: JsonDict = {"global_pool": "token"}
    if count != 4:
        arguments["num_reg_tokens"] = count
    theta = config.number("rope_theta") or 100.0
    if theta != 100:
        arguments["rope_temperature"] = theta
    if gated and matrix(weights, first)[0] % 8:
        arguments["swiglu_align_to"] = 1
    return described(weights, config, family, arguments)


def _registers(weights: Weights, config: Config) -> int:
    tokens = weights.tensors.get("reg_token")
    count = tokens.shape[1] if tokens is not None and tokens.ndim == 3 else 0
    config.must_have("num_register_tokens", count)
    return count


def _check_dinov3(weights: Weights, config: Config) -> None:
    if config.values.get("query_bias", True) != config.values.get("value_bias", True):
        raise config.wrong("query_bias", "unlike value_bias, and timm's DINOv3 has both or none")
    config.must_have("query_bias", "blocks.0.attn.q_bias" in weights.tensors)
    config.must_be("key_bias", False, "timm's DINOv3 has none")
    for part in ("proj_bias", "mlp_bias"):
        config.must_be(part, True, "timm's DINOv3 has one")


@_describe
def clip(weights: Weights, config: Config) -> Weights:
    quick = config.activation("quick_gelu") == "quick_gelu"
    template = f"vit_{{size}}_patch{{patch}}_clip{'_quickgelu' if quick else ''}_{{image}}"
    family = Family(Lineage(template, CLIP_SIZES, (16, 32, 14)), "CLIP's", 1e-5, "quick_gelu")
    arguments: JsonDict = activation(config, family, "quick_gelu" if quick else "gelu")
    if "norm.weight" not in weights.tensors:  # the classifier reads patches that are not normalized
        arguments |= {"global_pool": "avg", "final_norm": False}
    return described(weights, config, family, arguments)


@_describe
def siglip(weights: Weights, config: Config) -> Weights:
    pooled = any(name.startswith("attn_pool.") for name in weights.tensors)
    if "head.weight" not in weights.tensors:
        config.must_have("vision_use_head", pooled)
    pooling = "" if pooled else "_gap"
    template = f"vit_{{size}}_patch{{patch}}_siglip{pooling}_{{image}}"
    lineage = Lineage(template, SIGLIP_SIZES, (16, 14, 32), (224, 256, 384))
    family = Family(lineage, "one half each", 1e-6, "gelu_pytorch_tanh", prefix=0)
    return described(weights, config, family, activation(config, family, None))
