"""Read a transformers config.json with checks: each setting by its type, each size against the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ....models.errors import CheckpointError, Json
from ...report import some
from ...weights import Weights

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
