"""Conversion: a vision transformer with other attention operators, layer by layer.

A converted model is known to timm as `graftvit_converted` with the arguments `architecture` and `plan`, so
`timm.create_model` and saved folders rebuild it wherever this package is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import timm
from timm.models import load_pretrained, register_model
from torch import nn

from .errors import UnsupportedModelError
from .families import attention_blocks, check_supported
from .host import AttentionHost, Operator
from .operators import create_operator
from .plan import KEEP, Choice, parse_plan, plan_text

ARCHITECTURE = "graftvit_converted"


class ConvertedAttention(AttentionHost):
    """A host that stays: its operator is part of the model, and so are the operator's parameters."""

    permanent = True

    def __init__(self, original: nn.Module, operator: Operator, choice: Choice) -> None:
        super().__init__(original, operator)
        self.choice = choice


def convert(model: nn.Module, plan: str | Mapping[Any, str]) -> nn.Module:
    """A copy of `model` whose layers have the operators of `plan` (`models/plan.py`); all weights are kept.

    A layer that is already converted is converted anew, from the attention layer that it stands for.

    Raises:
        UnsupportedModelError: no adapter covers the model, or an operator cannot stand in for a layer.
        ConfigError: the plan is none, or names a layer or operator that is not there.
    """
    student = copy.deepcopy(model)
    for block in attention_blocks(student) if hasattr(student, "blocks") else ():
        if isinstance(block.attn, ConvertedAttention):
            block.attn = block.attn.original
    check_supported(student)
    blocks = attention_blocks(student)
    for index, (block, choice) in enumerate(zip(blocks, parse_plan(plan, len(blocks)), strict=True)):
        operator = create_operator(choice)
        if choice.operator == KEEP:
            continue
        _check_bias(student, block.attn, operator, choice, index)
        block.attn = ConvertedAttention(cast(nn.Module, block.attn), operator, choice)
    return student


def plan_of(model: nn.Module) -> str | None:
    """The plan of a converted model, None for one that is timm's own."""
    layers = [getattr(block, "attn", None) for block in getattr(model, "blocks", ())]
    choices = [layer.choice if isinstance(layer, ConvertedAttention) else Choice(KEEP) for layer in layers]
    return plan_text(tuple(choices)) if any(choice.operator != KEEP for choice in choices) else None


def _check_bias(model: Any, attention: Any, operator: Operator, choice: Choice, index: int) -> None:
    has_bias = (
        getattr(attention, "relative_position_bias_table", None) is not None
        or getattr(model, "rel_pos_bias", None) is not None
    )
    if has_bias and not getattr(operator, "takes_bias", True):
        raise UnsupportedModelError(
            f"plan: layer {index} has a relative position bias, which {choice.operator} has no place for; "
            f"keep it ('{index}: softmax')"
        )


@register_model
def graftvit_converted(
    pretrained: bool = False,
    *,
    architecture: str,
    plan: str,
    cache_dir: str | None = None,
    **arguments: Any,
) -> nn.Module:
    """The timm model `architecture` converted by `plan`; `pretrained` loads what its `pretrained_cfg` names."""
    model: Any = convert(timm.create_model(architecture, pretrained=False, **arguments), plan)
    if pretrained:
        channels = arguments.get("in_chans", 3)
        load_pretrained(model, num_classes=model.num_classes, in_chans=channels, cache_dir=cache_dir)
    return cast(nn.Module, model)
