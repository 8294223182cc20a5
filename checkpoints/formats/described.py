"""Read the model's description from the metadata of a file of bare tensors that `graftvit checkpoint` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...models.errors import CheckpointError
from ..weights import Weights

KEY = "graftvit.described"


def as_metadata(weights: Weights) -> dict[str, str]:
    """Architecture, arguments and normalization, which stood around the tensors; nothing where nothing did."""
    described = {
        "architecture": weights.architecture,
        "model_args": dict(weights.model_args),
        "pretrained_cfg": dict(weights.pretrained_cfg),
    }
    said = {name: value for name, value in described.items() if value}
    return {KEY: json.dumps(said)} if said else {}


def with_metadata(weights: Weights, metadata: Mapping[str, str]) -> Weights:
    """`weights` with what `as_metadata` wrote. Raises CheckpointError: it is damaged."""
    if KEY not in metadata:
        return weights
    try:
        said = json.loads(metadata[KEY])
        architecture, arguments = said.get("architecture"), said.get("model_args") or {}
        config = {name: _value(name, value) for name, value in (said.get("pretrained_cfg") or {}).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{weights.origin} is damaged: its {KEY} is no description") from error
    if not isinstance(architecture, str | None) or not isinstance(arguments, dict):
        raise CheckpointError(f"{weights.origin} is damaged: its {KEY} names no architecture")
    return replace(weights, architecture=architecture, model_args=arguments, pretrained_cfg=config)


def _value(name: str, value: Any) -> Any:
    """Read a value of the description.

    Raises ValueError: a mean or a standard deviation that is no list of numbers, one a channel.
    """
    if name not in ("mean", "std"):
        return value
    if not isinstance(value, list) or not all(isinstance(one, float | int) for one in value):
        raise ValueError(name)
    return tuple(map(float, value))
