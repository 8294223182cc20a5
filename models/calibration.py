"""Calibration: fit each new operator to the output of its teacher layer on a batch of images."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .attention.base import AttentionOperator, Heads
from .attention.softmax import Softmax
from .errors import UnsupportedModelError
from .families import attention_blocks, evaluating, vit
from .host import AttentionHost, Given, observe

if TYPE_CHECKING:
    from .conversion import ConvertedAttention


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
    """Calibrate the converted `layers` (by number) on `images` (B, 3, H, W); `teacher` is the softmax model.

    Raises UnsupportedModelError: the size of the images is not the teacher's.
    """
    originals = {index: attention_blocks(teacher)[index].attn for index in layers}
    hooks = [
        observe(originals[index], partial(_calibrate_layer, layer, originals[index]))
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


def _calibrate_layer(layer: ConvertedAttention, original: nn.Module, given: Given) -> None:
    """Calibrate a layer on the input of the teacher's layer of the same depth."""
    target = Softmax()(AttentionHost(original).project(*given))
    layer.calibration = calibrate(layer.operator, layer.project(*given), target)


def _error(operator: AttentionOperator, heads: Heads, target: Tensor) -> float:
    with torch.no_grad():
        difference = operator(heads).float() - target.float()
    return float(difference.norm() / target.float().norm().clamp_min(1e-30))
