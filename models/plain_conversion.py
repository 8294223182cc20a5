"""Conversion of plain vision transformers: each layer of the plan gets its operator."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .attention.base import AttentionOperator, Projections, Traits
from .calibration import Finished, calibrate_layers
from .converted import ConvertedAttention, TokenGrid, converted_layers, initialize
from .errors import ConfigError, UnsupportedModelError
from .families import attention_blocks, check_supported, image_size, sites, token_layout, vit
from .layer_plan import Choice, check_choice, create_operator
from .plan_syntax import KEEP, NONE, parse_plan
from .pyramid_conversion import sharing_copy


def convert_plain(
    model: nn.Module,
    plan: str | Mapping[Any, str],
    *,
    weights: str,
    calibration: Tensor | None,
    seed: int = 0,
    finished: Finished | None = None,
) -> nn.Module:
    """Return a copy of a plain vision transformer with the operators of `plan`, as `conversion.convert` describes."""
    student = _softmax_only(copy.deepcopy(model))
    check_supported(student, pyramids=True)
    blocks = attention_blocks(student)
    tokens = TokenGrid(student, token_layout(student).geometry, image_size(student))
    shapes = [site.shape for site in sites(student)]
    choices = parse_plan(plan, len(blocks))
    for choice in choices:
        if choice.operator == NONE:
            raise ConfigError(
                "plan: 'none' takes the attention out of a layer of a pyramid; a plain vision transformer has no other "
                "layers in which tokens meet: name an operator, such as uniform"
            )
        check_choice(choice)
    converted = {index: choice for index, choice in enumerate(choices) if choice.operator != KEEP}
    initialize(student, converted, weights)
    first: dict[tuple[str, int], AttentionOperator] = {}
    for index, choice in converted.items():
        original = blocks[index].attn
        operator = create_operator(choice, shapes[index])
        if weights == "none":
            operator.start_fresh()
        shared = first.setdefault((str(choice), shapes[index].num_heads), operator)
        if shared is not operator:
            operator.share(shared)
        _check_layer(student, original, operator.traits, choice, index)
        operator.adopt(Projections(original))
        like = next(original.parameters())
        blocks[index].attn = ConvertedAttention(original, operator.to(like), choice, tokens)
    if getattr(student, "dynamic_img_size", False):
        vit(student).patch_embed.register_forward_hook(tokens)
    if calibration is not None:
        calibrate_layers(
            _softmax_only(sharing_copy(model)),
            converted_layers(student),
            calibration,
            seed=seed,
            finished=finished,
        )
    return student


def _softmax_only(model: nn.Module) -> nn.Module:
    """Put the original layers back into `model` in place of converted ones, and return it."""
    for block in attention_blocks(model):
        layer = getattr(block, "attn", None)
        if isinstance(layer, ConvertedAttention):
            block.attn = layer.original
    hooks: dict[int, Any] = getattr(getattr(model, "patch_embed", None), "_forward_hooks", {})
    for key in [key for key, hook in hooks.items() if isinstance(hook, TokenGrid)]:
        del hooks[key]
    return model


def _check_layer(model: nn.Module, attention: Any, traits: Traits, choice: Choice, index: int) -> None:
    """Raise UnsupportedModelError if a layer has a part that the operator does not support."""
    keep = f"keep it ('{index}: softmax')"
    has_bias = (
        getattr(attention, "relative_position_bias_table", None) is not None
        or getattr(model, "rel_pos_bias", None) is not None
    )
    if has_bias and not traits.bias:
        raise UnsupportedModelError(
            f"plan: layer {index} has a relative position bias, which {choice.operator} does not support; {keep}"
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
