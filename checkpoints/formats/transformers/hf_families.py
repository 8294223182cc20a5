"""Map each family of transformers to timm: its architectures, their activation and its images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ....models.errors import CheckpointError, Json, JsonDict
from ...class_names import KEY as LABEL_NAMES
from ...weights import Weights
from ..normalization import IMAGENET, INCEPTION, normalized
from .hf_config import Config
from .lineages import Lineage, architecture_of
from .sizes import measure

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
