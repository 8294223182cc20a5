"""Calibration: fit each new operator to the output of its teacher layer on a batch of images."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .attention.base import AttentionOperator, Heads
from .errors import UnsupportedModelError
from .families import evaluating, sites, vit
from .host import AttentionHost
from .hosting import Call, watch_layer

if TYPE_CHECKING:
    from .converted import ConvertedAttention


def calibrate(operator: AttentionOperator, heads: Heads, target_BHND: Tensor) -> tuple[float, float]:
    """Calibrate an operator and return its relative output error ‖out − target‖ / ‖target‖ before and after.

    If calibration increases the error, restore the parameters.
    """
    start, before = copy.deepcopy(operator.state_dict()), _error(operator, heads, target_BHND)
    operator.calibrate(heads, target_BHND)
    after = _error(operator, heads, target_BHND)
    if after <= before:
        return before, after
    operator.load_state_dict(start)
    return before, before


def calibrate_layers(teacher: nn.Module, layers: Mapping[int, ConvertedAttention], images: Tensor) -> None:
    """Calibrate the converted `layers` (by number) on `images` (B, 3, H, W); `teacher` is the model that
    was converted, and its layers may get hosts.

    Raises UnsupportedModelError: the size of the images is not the teacher's.
    """
    places = sites(teacher)
    hooks = [
        watch_layer(teacher, places[index], partial(_calibrate_layer, layer))
        for index, layer in layers.items()
    ]
    like = next(teacher.parameters())
    try:
        with torch.no_grad(), evaluating(teacher, *layers.values()):
            vit(teacher).forward_features(images.to(like))
    except AssertionError as error:  # raised by timm's patch embedding
        size = "x".join(map(str, images.shape[-2:]))
        raise UnsupportedModelError(f"calibration images of {size} do not fit the model: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()


def _calibrate_layer(layer: ConvertedAttention, native: AttentionHost, call: Call) -> None:
    """Calibrate a layer on the input of the teacher's layer of the same depth."""
    target = native.attend(native.heads_of(*call.inputs, **call.keywords))
    layer.calibration = calibrate(layer.operator, layer.heads_of(*call.inputs, **call.keywords), target)


def _error(operator: AttentionOperator, heads: Heads, target: Tensor) -> float:
    with torch.no_grad():
        difference = operator(heads).float() - target.float()
    return float(difference.norm() / target.float().norm().clamp_min(1e-30))
