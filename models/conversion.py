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
from torch import Tensor, nn

from .attention.base import AttentionOperator, Geometry, LayerShape, Traits
from .errors import UnsupportedModelError
from .families import attention_blocks, attention_shape, check_supported, token_layout
from .host import AttentionHost
from .operators import check_choice, create_operator
from .plan import KEEP, Choice, parse_plan, plan_text

ARCHITECTURE = "graftvit_converted"


class TokenGrid:
    """The geometry that all layers of a model share; a hook that reads it off the patches of each batch where the
    image size is free."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def __call__(self, module: nn.Module, inputs: object, patches: Tensor) -> None:
        if patches.ndim == 4:  # (B, height, width, C)
            self.geometry = Geometry(self.geometry.num_prefix, (patches.shape[1], patches.shape[2]))


class ConvertedAttention(AttentionHost):
    """A host that stays: its operator is part of the model, and so are the operator's parameters."""

    permanent = True

    def __init__(
        self, original: nn.Module, operator: AttentionOperator, choice: Choice, tokens: TokenGrid
    ) -> None:
        super().__init__(original, operator)
        self.choice = choice
        self.tokens = tokens

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        return self.tokens.geometry


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
    blocks, layout, layer = attention_blocks(student), token_layout(student), attention_shape(student)
    tokens = TokenGrid(Geometry(layout.num_prefix, layout.grid))
    shape = LayerShape(layer.num_heads, layer.head_dim, tokens.geometry)
    for index, (block, choice) in enumerate(zip(blocks, parse_plan(plan, len(blocks)), strict=True)):
        check_choice(choice)
        if choice.operator == KEEP:
            continue
        operator = create_operator(choice, shape)
        _check_layer(student, block.attn, operator.traits, choice, index)
        block.attn = ConvertedAttention(cast(nn.Module, block.attn), operator, choice, tokens)
    if getattr(student, "dynamic_img_size", False):
        cast(Any, student).patch_embed.register_forward_hook(tokens)
    return student


def converted_layers(model: nn.Module) -> dict[int, ConvertedAttention]:
    """The converted layers by their number."""
    layers = enumerate(getattr(block, "attn", None) for block in getattr(model, "blocks", ()))
    return {index: layer for index, layer in layers if isinstance(layer, ConvertedAttention)}


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the conversion brought: those of the operators."""
    return [
        parameter
        for layer in converted_layers(model).values()
        for parameter in cast(nn.Module, layer.operator).parameters()
    ]


def resize(model: nn.Module, img_size: tuple[int, int]) -> None:
    """Another image size for a model, converted or not: timm resamples positions, the operators their own."""
    cast(Any, model).set_input_size(img_size=img_size)
    layout = token_layout(model)
    for layer in converted_layers(model).values():
        layer.tokens.geometry = Geometry(layout.num_prefix, layout.grid)
        cast(AttentionOperator, layer.operator).resample(layer.tokens.geometry)


def plan_of(model: nn.Module) -> str | None:
    """The plan of a converted model, None for one that is timm's own."""
    layers = [getattr(block, "attn", None) for block in getattr(model, "blocks", ())]
    choices = [layer.choice if isinstance(layer, ConvertedAttention) else Choice(KEEP) for layer in layers]
    return plan_text(tuple(choices)) if any(choice.operator != KEEP for choice in choices) else None


def with_plan(architecture: str, arguments: Mapping[str, Any], plan: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which timm builds `architecture` converted by `plan`, in place of an older plan."""
    given = dict(arguments)
    if architecture == ARCHITECTURE:
        architecture = given.pop("architecture")
    return ARCHITECTURE, {**given, "architecture": architecture, "plan": plan}


def _check_layer(model: Any, attention: Any, traits: Traits, choice: Choice, index: int) -> None:
    """UnsupportedModelError where a layer has what the operator has no place for."""
    keep = f"keep it ('{index}: softmax')"
    has_bias = (
        getattr(attention, "relative_position_bias_table", None) is not None
        or getattr(model, "rel_pos_bias", None) is not None
    )
    if has_bias and not traits.bias:
        raise UnsupportedModelError(
            f"plan: layer {index} has a relative position bias, which {choice.operator} has no place for; {keep}"
        )
    if getattr(attention.attn_drop, "p", 0) > 0 and not traits.dropout:
        raise UnsupportedModelError(
            f"plan: layer {index} has attn_drop {attention.attn_drop.p:g}, and {choice.operator} has no map to "
            f"drop from; build the model with attn_drop_rate 0, or {keep}"
        )
    drop = getattr(model, "patch_drop", None)
    if traits.needs_grid and drop is not None and not isinstance(drop, nn.Identity):
        raise UnsupportedModelError(
            f"plan: {choice.operator} needs the whole token grid, and the model drops patches; build it with "
            f"patch_drop_rate 0, or {keep}"
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
