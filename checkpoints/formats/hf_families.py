"""Map each family of transformers to timm: its architectures, their activation and its images."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models import is_model

from ...models.errors import CheckpointError, Json, JsonDict
from ..class_names import KEY as LABEL_NAMES
from ..report import some
from ..weight_files import Weights
from .keymap import IMAGENET, INCEPTION, Describe, normalized

# Read a transformers config.json with checks: each setting by its type, each size against the tensors.

ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
    "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
"""transformers' names of activations in timm's."""
MODEL_TYPES = (
    "vit", "deit", "vit_mae", "vit_msn", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip",
    "clip_vision_model", "siglip", "siglip_vision_model", "beit",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The settings of a vision tower; empty where there is no config.json."""

    origin: str
    values: Json
    preprocessor: Json = field(default_factory=dict)
    """Of preprocessor_config.json."""

    def whole(self, key: str) -> int | None:
        """Return a positive whole number."""
        value = self.values.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise self.wrong(key, "which is no positive whole number")
        return value

    def number(self, key: str) -> float | None:
        """Return a positive number."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e6:
            raise self.wrong(key, "which is no positive number below a million")
        return float(value)

    def pair(self, key: str) -> tuple[int, int] | None:
        """(height, width) from one number or two."""
        value = self.values.get(key)
        if value is None:
            return None
        pair = (value, value) if isinstance(value, int) else value
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(_is_size(side) for side in pair):
            raise self.wrong(key, "which is no size in pixels")
        return int(pair[0]), int(pair[1])

    def activation(self, default: str) -> str:
        """timm's name of `hidden_act`."""
        value = self.values.get("hidden_act", default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.wrong("hidden_act", f"which is not supported; supported are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def must_be(self, key: str, wanted: Any, reason: str) -> None:
        """Refuse an option that changes what the model computes in a way that timm cannot."""
        if self.values.get(key, wanted) != wanted:
            raise self.wrong(key, f"which is not supported: {reason}")

    def must_have(self, key: str, found: bool | int) -> None:
        """Refuse a setting that the tensors contradict, where config.json has it: a part of them is not there."""
        if self.values.get(key, found) != found:
            raise self.wrong(key, f"but its weights have {found if found else 'none'}")

    def agree(self, key: str, found: Any) -> None:
        """Refuse a size that the tensors contradict."""
        said = self.pair(key) if isinstance(found, tuple) else self.whole(key)
        if said is not None and said != found:
            raise self.wrong(key, f"but its weights have {found}")

    def wrong(self, key: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.origin}: config.json says {key}={self.values.get(key)!r}, {why}")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def tower_config(weights: Weights, config: Json) -> Config:
    """Return the settings of the vision tower, which a model of images and text keeps in `vision_config`."""
    vision, preprocessor = config.get("vision_config"), config.get("preprocessor")
    return Config(
        weights.origin,
        vision if isinstance(vision, Mapping) else config,
        preprocessor if isinstance(preprocessor, Mapping) else {},
    )


def check_model_type(origin: str, config: Json) -> None:
    """Raise CheckpointError: config.json names a type of model that no key map knows."""
    kind = config.get("model_type")
    if kind is not None and kind not in MODEL_TYPES:
        raise CheckpointError(
            f"{origin} is a transformers model of type {kind!r}, which is not supported; supported are "
            f"{', '.join(MODEL_TYPES)}"
        )


def not_of_type(weights: Weights, config: Json) -> CheckpointError:
    """Return what to say of tensors that no key map knows beside a config.json of a type that one should."""
    return CheckpointError(
        f"{weights.origin} is not whole or is no vision tower: config.json says model_type="
        f"{config['model_type']!r}, but it holds {some(weights.tensors, 3)}"
    )


# Read the sizes of a vision tower from its tensors, and compare them with its config.json.

TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class Tower:
    """The sizes of a vision tower; those that tensors show agree with config.json."""

    width: int
    depth: int
    hidden: int
    """Rows of the first projection of the MLP."""
    patch: tuple[int, int]
    channels: int
    heads: int | None
    """None without config.json: no tensor shows it."""
    image: tuple[int, int] | None


def measure(
    weights: Weights,
    config: Config,
    *,
    heads: int,
    prefix: int,
    hidden_setting: str | None = "intermediate_size",
) -> Tower:
    """Return the sizes of the tower under timm's names.

    `heads` is transformers' default, `prefix` the number of tokens before the patches in the position
    embedding, `hidden_setting` what config.json calls the width inside the MLP, where it says it.

    Raises CheckpointError: a tensor that shows a size is absent, or config.json contradicts it.
    """
    width, channels, *patch = _shape(weights, "patch_embed.proj.weight", 4)
    size = (patch[0], patch[1])
    depth = _depth(weights)
    hidden, _ = matrix(weights, _first_projection(weights))
    config.agree("hidden_size", width)
    config.agree("num_hidden_layers", depth)
    config.agree("patch_size", size)
    config.agree("num_channels", channels)
    if hidden_setting is not None:
        config.agree(hidden_setting, hidden)
    number = (config.whole("num_attention_heads") or heads) if config.values else None
    if number is not None and width % number:
        raise CheckpointError(
            f"{weights.origin}: config.json says num_attention_heads={number}, which does not divide the width {width}"
        )
    return Tower(width, depth, hidden, size, channels, number, _image(weights, config, size, prefix))


def _shape(weights: Weights, name: str, ndim: int) -> tuple[int, ...]:
    tensor = weights.tensors.get(name)
    if tensor is None or tensor.ndim != ndim or 0 in tensor.shape:
        raise CheckpointError(
            f"{weights.origin} is not whole: {'it lacks ' if tensor is None else 'it has an odd '}{name}"
        )
    return tuple(tensor.shape)


def matrix(weights: Weights, name: str) -> tuple[int, int]:
    """Return rows and columns of a weight. Raises CheckpointError: it is not there or is no matrix."""
    rows, columns = _shape(weights, name, 2)
    return rows, columns


def _first_projection(weights: Weights) -> str:
    gate = "blocks.0.mlp.fc1_g.weight"
    return gate if gate in weights.tensors else "blocks.0.mlp.fc1.weight"


def _depth(weights: Weights) -> int:
    blocks = {int(key.split(".")[1]) for key in weights.tensors if key.startswith("blocks.")}
    absent = next(index for index in range(len(blocks) + 1) if index not in blocks)
    if absent < len(blocks):
        raise CheckpointError(f"{weights.origin} is not whole: it lacks block {absent} of {1 + max(blocks)}")
    return len(blocks)


def _image(weights: Weights, config: Config, patch: tuple[int, int], prefix: int) -> tuple[int, int] | None:
    """Height and width of the images: as config.json says, where the embeddings of positions agree."""
    position = weights.tensors.get("pos_embed")
    tokens = position.shape[1] - prefix if position is not None and position.ndim == 3 else None
    tables = (tensor for name, tensor in weights.tensors.items() if name.endswith(TABLE) and tensor.ndim == 2)
    offsets = next((table.shape[0] for table in tables), None)
    image = config.pair("image_size")
    if image is None:
        side = _side(tokens, offsets)
        return (side * patch[0], side * patch[1]) if side else None
    rows, columns = image[0] // patch[0], image[1] // patch[1]
    said = f"which makes {rows}x{columns} patches"
    if rows * columns == 0:
        raise config.wrong("image_size", f"{said}: those of its weights are {patch[0]}x{patch[1]} pixels")
    if tokens not in (None, rows * columns):
        raise config.wrong("image_size", f"{said}, but its pos_embed has {tokens}")
    if offsets not in (None, (2 * rows - 1) * (2 * columns - 1) + 3):
        raise config.wrong("image_size", f"{said}, but its tables of relative positions have {offsets} rows")
    return image


def _side(tokens: int | None, offsets: int | None) -> int | None:
    """Return the side of a square grid with this many patches, or with this many offsets between patches."""
    count, halves = (tokens, 1) if tokens is not None else (None if offsets is None else offsets - 3, 2)
    root = math.isqrt(max(count or 0, 0))
    return (root + halves - 1) // halves if root * root == count else None


# Choose timm's architecture for a tower of transformers: the published one if the sizes match, else a near one.

SIZES = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "giantopt": (1536, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
    "giant packed": (1536, 40, 24, 8192),
    "small_plus": (384, 12, 6, 1536),
    "huge_plus": (1280, 32, 20, 5120),
    "7b": (4096, 40, 32, 8192),
}
"""timm's name of a size: width, depth, heads, rows of the MLP's first projection."""


@dataclass(frozen=True)
class Lineage:
    """timm's architectures of one kind; the first size, patch and image are those to start from."""

    template: str
    """Of their names, from {size}, {patch} and {image}."""
    sizes: tuple[str, ...]
    patches: tuple[int, ...] = (16,)
    images: tuple[int, ...] = (224,)

    def name(self, size: str, patch: int | None, image: int | None) -> str:
        """timm's name, of a model that there may not be."""
        return self.template.format(size=size.split()[0], patch=patch, image=image)


def architecture_of(lineage: Lineage, tower: Tower) -> tuple[str, JsonDict] | None:
    """timm's name for a tower, and the arguments in which the tower differs from it.

    None where no config.json gives the number of heads and the sizes are of no published model.
    """
    match = next((name for name in lineage.sizes if _fits_tower(SIZES[name], tower)), None)
    if match is None and tower.heads is None:
        return None
    patch, image = _square(tower.patch), _square(tower.image)
    sizes = [name for name in (match, lineage.sizes[0]) if name is not None]
    choices = product(sizes, (patch, *lineage.patches), (image, *lineage.images))
    size, pixels, resolution = next(choice for choice in choices if is_model(lineage.name(*choice)))
    published = {"patch_size": pixels, "img_size": resolution if "{image}" in lineage.template else None}
    found = {"patch_size": _plain(tower.patch), "img_size": _plain(tower.image)}
    arguments = {key: value for key, value in found.items() if value not in (None, published[key])}
    if tower.channels != 3:
        arguments["in_chans"] = tower.channels
    name = lineage.name(size, pixels, resolution)
    return name, arguments if size == match else {**arguments, **_sizes(SIZES[size], tower)}


def _fits_tower(size: tuple[int, int, int, int], tower: Tower) -> bool:
    width, depth, heads, hidden = size
    same = (width, depth, hidden) == (tower.width, tower.depth, tower.hidden)
    return same and tower.heads in (None, heads)


def _sizes(size: tuple[int, int, int, int], tower: Tower) -> Json:
    width, depth, heads, _ = size
    ratio = tower.hidden / tower.width
    if int(tower.width * ratio) != tower.hidden:
        ratio = (tower.hidden + 0.5) / tower.width  # timm rounds down
    named = {
        "embed_dim": (tower.width, width),
        "depth": (tower.depth, depth),
        "num_heads": (tower.heads, heads),
    }
    return {key: ours for key, (ours, theirs) in named.items() if ours != theirs} | {"mlp_ratio": ratio}


def _square(pair: tuple[int, int] | None) -> int | None:
    return pair[0] if pair is not None and pair[0] == pair[1] else None


def _plain(pair: tuple[int, int] | None) -> int | list[int] | None:
    return None if pair is None else _square(pair) or list(pair)


CLIP = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD}
STATISTICS = {"ImageNet's": IMAGENET, "one half each": INCEPTION, "CLIP's": CLIP}
"""Mean and std by their name in reports."""
PLACEHOLDER = re.compile(r"LABEL_\d+")
"""What transformers calls a class that nobody named."""
LIMIT = 1e6
"""Of mean and std, so that no number of a damaged file overflows."""


@dataclass(frozen=True)
class Family:
    """What holds for all models of a family; the defaults are those of its configuration in transformers."""

    lineage: Lineage
    statistics: str
    """Of `STATISTICS`: what its published models were trained with."""
    epsilon: float = 1e-12
    activation: str = "gelu"
    """transformers' name."""
    heads: int = 12
    prefix: int = 1
    """Tokens before the patches in the position embedding."""
    hidden_setting: str | None = "intermediate_size"
    """What config.json calls the width inside the MLP, where it says it."""


def described(weights: Weights, config: Config, family: Family, arguments: Json) -> Weights:
    """`weights` with timm's architecture, the arguments that sizes say and those given, and mean and std.

    Without config.json an architecture of unknown sizes stays open.

    Raises CheckpointError as `measure`, or: preprocessor_config.json is damaged.
    """
    tower = measure(
        weights, config, heads=family.heads, prefix=family.prefix, hidden_setting=family.hidden_setting
    )
    architecture, sizes = architecture_of(family.lineage, tower) or (None, {})
    notes, epsilon = weights.notes, None
    if config.values:
        epsilon = config.number("layer_norm_eps") or family.epsilon
    else:
        notes = (*notes, "no config.json: heads, activation and epsilon are those of the published models")
    size = {} if tower.image is None else {"input_size": (tower.channels, *tower.image)}
    known = replace(
        weights,
        architecture=architecture,
        model_args={**sizes, **arguments},
        pretrained_cfg={**size, **_class_names(config)},
        notes=notes,
        norm_eps=epsilon,
    )
    return _with_statistics(known, config, family, tower.channels)


def _class_names(config: Config) -> JsonDict:
    """Return the classes under timm's key; none where they are numbers under another name."""
    names = config.values.get("id2label")
    if not isinstance(names, Mapping) or all(PLACEHOLDER.fullmatch(str(name)) for name in names.values()):
        return {}
    return {LABEL_NAMES: dict(names)}


def activation(config: Config, family: Family, published: str | None) -> dict[str, str]:
    """Return the argument for an activation other than the architecture's own; of None, timm's names differ in it."""
    ours = config.activation(family.activation)
    return {} if ours == published else {"act_layer": ours}


def only_activation(config: Config, family: Family, wanted: str) -> None:
    """Refuse an activation that timm's family has no argument for."""
    if config.values and config.activation(family.activation) != wanted:
        raise config.wrong("hidden_act", f"and timm's family has {wanted} alone")


def without_bias(weights: Weights, config: Config, name: str = "attn.qkv.bias") -> dict[str, bool]:
    """Return the argument for projections to queries, keys and values that have no bias."""
    biased = f"blocks.0.{name}" in weights.tensors
    config.must_have("qkv_bias", biased)
    return {} if biased else {"qkv_bias": False}


def _with_statistics(weights: Weights, config: Config, family: Family, channels: int) -> Weights:
    """Mean and std, one number a channel: the preprocessor's, else those of the published models."""
    preprocessor = config.preprocessor
    own: JsonDict = {name: preprocessor.get(f"image_{name}") for name in ("mean", "std")}
    if preprocessor.get("do_normalize") is False:
        own, reason = {"mean": 0.0, "std": 1.0}, "none, as preprocessor_config.json says"
    elif None in own.values():
        published = STATISTICS[family.statistics]
        own = {name: value if len(value) == channels else value[0] for name, value in published.items()}
        reason = f"{family.statistics}, as its published models, for no preprocessor_config.json says it"
    else:
        reason = "preprocessor_config.json's"
    return normalized(weights, {name: _numbers(weights, name, own[name], channels) for name in own}, reason)


def _numbers(weights: Weights, name: str, value: Any, channels: int) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * channels
    finite = all(isinstance(number, (int, float)) and abs(number) < LIMIT for number in values)
    if len(values) != channels or not finite or (name == "std" and min(values) <= 0):
        raise CheckpointError(
            f"{weights.origin}: the images' {name} {value!r} of preprocessor_config.json is not one number for "
            f"each of {channels} channels{' above 0' if name == 'std' else ''}"
        )
    return tuple(map(float, values))


# Turn the tensors and the config.json of a transformers family into timm's architecture and arguments.

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
