"""The weights that a converted model starts from: all, all but attention, or none of the teacher's."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, Literal

from torch import nn

from .errors import ConfigError, did_you_mean
from .families import blocks_of, vit
from .token_merging import OffsetConv2d

KeptWeights = Literal["all", "mlp", "none"]
WEIGHTS: dict[str, str] = {
    "all": "every weight is the teacher's",
    "mlp": "the attention of converted layers is fresh, all other weights are the teacher's",
    "none": "every weight is fresh",
}


def initialize(model: nn.Module, layers: Collection[int], weights: str) -> None:
    """Keep the weights of `model` selected by `weights`, initialize the rest; `layers` are the converted layers.

    Raises ConfigError: `weights` is not one of WEIGHTS.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights={weights!r}; {did_you_mean(str(weights), WEIGHTS)}")
    if weights == "none":
        _initialize(model)
    elif weights == "mlp":
        fresh, blocks = blocks_of(_fresh(model)), blocks_of(model)
        for index in layers:
            blocks[index].attn.load_state_dict(fresh[index].attn.state_dict())


def _fresh(model: nn.Module) -> nn.Module:
    """Return a copy that timm has initialized with the family's own scales."""
    fresh = copy.deepcopy(model)
    _initialize(fresh)
    return fresh


def _initialize(model: nn.Module) -> None:
    """Initialize every weight as timm's constructor does; PVTv2 and Twins have no method for it."""
    if hasattr(model, "init_weights"):
        vit(model).init_weights()
        return
    for module in model.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    own: Any = model
    model.apply(own._init_weights)
    for module in model.modules():
        if isinstance(module, OffsetConv2d):
            module.reset_parameters()
