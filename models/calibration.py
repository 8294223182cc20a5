"""Calibration: each operator starts near the teacher's layer, from what that layer sees on a batch of images."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .attention.base import AttentionOperator, Heads
from .attention.softmax import Softmax
from .errors import UnsupportedModelError
from .families import attention_blocks
from .host import AttentionHost

if TYPE_CHECKING:
    from .conversion import ConvertedAttention


class CalibratingAttention(AttentionHost):
    """The teacher's layer, which calibrates the student's layer of the same depth as a batch passes through."""

    def __init__(self, original: nn.Module, student: ConvertedAttention) -> None:
        super().__init__(original)
        self.pupil = (student,)  # in a tuple: not a part of the teacher

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        (student,) = self.pupil
        target = Softmax()(self.project(x, rope, shared_rel_pos_bias))
        heads = student.project(x, rope, shared_rel_pos_bias)
        student.calibration = calibrate(cast(AttentionOperator, student.operator), heads, target)
        return self.merge(target, x)


def calibrate(operator: AttentionOperator, heads: Heads, target_BHND: Tensor) -> tuple[float, float]:
    """Calibrates an operator and returns its relative output error ‖out − target‖ / ‖target‖ before and after.

    An operator that this would take further from the target keeps the parameters that it had.
    """
    start, before = copy.deepcopy(operator.state_dict()), _error(operator, heads, target_BHND)
    operator.calibrate(heads, target_BHND)
    after = _error(operator, heads, target_BHND)
    if after <= before:
        return before, after
    operator.load_state_dict(start)
    return before, before


def calibrate_layers(teacher: nn.Module, layers: Mapping[int, ConvertedAttention], images: Tensor) -> None:
    """Calibrates converted `layers` by their number; `teacher` is the softmax model, `images` (B, 3, H, W).

    Raises UnsupportedModelError: the images are of another size than the teacher's.
    """
    teacher.eval()
    modes = [(layer, layer.training) for layer in layers.values()]
    blocks = attention_blocks(teacher)
    for index, layer in layers.items():
        layer.eval()
        blocks[index].attn = CalibratingAttention(cast(nn.Module, blocks[index].attn), layer)
    like = next(teacher.parameters())
    try:
        with torch.no_grad():
            cast(Any, teacher).forward_features(images.to(like))
    except AssertionError as error:  # of timm's patch embedding
        size = "x".join(map(str, images.shape[-2:]))
        raise UnsupportedModelError(f"calibration images of {size} do not fit the model: {error}") from error
    finally:
        for layer, training in modes:
            layer.train(training)


def _error(operator: AttentionOperator, heads: Heads, target: Tensor) -> float:
    with torch.no_grad():
        difference = operator(heads).float() - target.float()
    return float(difference.norm() / target.float().norm().clamp_min(1e-30))
