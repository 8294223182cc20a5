"""Conversion: replace the attention operators of a vision transformer, layer by layer.

A converted model is the timm model `graftvit_converted` with the arguments `architecture` and `plan`, so
`timm.create_model` and saved folders rebuild it wherever this package is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
from timm.models import load_pretrained, register_model
from torch import Tensor, nn

from . import small  # noqa: F401  registers the small models with timm
from .attention.base import AttentionOperator, Geometry, LayerShape, Traits
from .calibration import calibrate_layers
from .errors import UnsupportedModelError
from .families import (
    attention_blocks,
    attention_shape,
    check_patches,
    check_supported,
    image_size,
    patch_size,
    token_layout,
    vit,
)
from .host import AttentionHost
from .initialize import KeptWeights, initialize
from .json_types import Json, JsonDict
from .layer_plan import KEEP, Choice, parse_plan, plan_text
from .operators import check_choice, create_operator
from .replay import replay_blocks

ARCHITECTURE = "graftvit_converted"


class TokenGrid:
    """The geometry that all layers of a model share. As a hook it reads the geometry from the patches of each batch,
    for models of any image size. `plan_size` is the image size (height, width) that the operators were created for."""

    def __init__(self, model: nn.Module, geometry: Geometry, plan_size: tuple[int, int] | None) -> None:
        self.model = model
        self.geometry = geometry
        self.plan_size = plan_size

    def __call__(self, module: nn.Module, inputs: object, patches: Tensor) -> None:
        if patches.ndim == 4:  # (B, height, width, C)
            self.geometry = Geometry(self.geometry.num_prefix, (patches.shape[1], patches.shape[2]))
            replay_blocks(self.model, GridMoment(self, self.geometry))


@dataclass(frozen=True)
class GridMoment:
    """The geometry of one forward pass."""

    tokens: TokenGrid
    geometry: Geometry

    def is_now(self) -> bool:
        return self.tokens.geometry is self.geometry

    @contextmanager
    def again(self) -> Iterator[None]:
        before, self.tokens.geometry = self.tokens.geometry, self.geometry
        try:
            yield
        finally:
            self.tokens.geometry = before


class ConvertedAttention(AttentionHost):
    """A permanent host: its operator and the operator's parameters are part of the model."""

    permanent = True
    operator: AttentionOperator

    def __init__(
        self, original: nn.Module, operator: AttentionOperator, choice: Choice, tokens: TokenGrid
    ) -> None:
        super().__init__(original, operator)
        self.choice = choice
        self.tokens = tokens
        self.calibration: tuple[float, float] | None = None
        """Relative output error on the calibration batch, before and after."""

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        return self.tokens.geometry


def convert(
    model: nn.Module,
    plan: str | Mapping[Any, str],
    *,
    weights: KeptWeights = "all",
    calibration: Tensor | None = None,
) -> nn.Module:
    """Return a copy of `model` whose layers have the operators of `plan` (`models/layer_plan.py`).

    A converted layer is converted again from its original attention layer.

    Args:
        weights: "all" keeps every weight; "mlp" initializes the attention of converted layers again, as timm does for
            the family; "none" initializes every weight again.
        calibration: images (B, 3, H, W), normalized for the model. Operators that can be calibrated are fitted to the
            output of their layer in `model` on these images, unless this increases the error.

    Raises:
        UnsupportedModelError: the model is not supported, or an operator cannot replace a layer.
        ConfigError: the plan is invalid, or names a layer or operator that does not exist.
    """
    student = _softmax_only(copy.deepcopy(model))
    check_supported(student)
    blocks, layer = attention_blocks(student), attention_shape(student)
    tokens = TokenGrid(student, token_layout(student).geometry, image_size(student))
    shape = LayerShape(layer.num_heads, layer.head_dim, tokens.geometry)
    choices = parse_plan(plan, len(blocks))
    for choice in choices:
        check_choice(choice)
    converted = {index: choice for index, choice in enumerate(choices) if choice.operator != KEEP}
    initialize(student, converted, weights)
    first: dict[str, AttentionOperator] = {}
    for index, choice in converted.items():
        original = blocks[index].attn
        operator = create_operator(choice, shape)
        if first.setdefault(str(choice), operator) is not operator:
            operator.share(first[str(choice)])
        _check_layer(student, original, operator.traits, choice, index)
        like = next(original.parameters())
        blocks[index].attn = ConvertedAttention(original, operator.to(like), choice, tokens)
    if getattr(student, "dynamic_img_size", False):
        vit(student).patch_embed.register_forward_hook(tokens)
    if calibration is not None:
        calibrate_layers(_softmax_only(_sharing_copy(model)), converted_layers(student), calibration)
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


def _sharing_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of `model`, but share its tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def converted_layers(model: nn.Module) -> dict[int, ConvertedAttention]:
    """Return the converted layers by number."""
    layers = enumerate(getattr(block, "attn", None) for block in attention_blocks(model))
    return {index: layer for index, layer in layers if isinstance(layer, ConvertedAttention)}


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the conversion added: those of the operators."""
    return [
        parameter for layer in converted_layers(model).values() for parameter in layer.operator.parameters()
    ]


def layer_macs(model: nn.Module) -> tuple[int, dict[int, int]]:
    """Return the multiply-adds of attention for one image: of a softmax layer, and of converted layers by number."""
    geometry, layer = token_layout(model).geometry, attention_shape(model)
    shape = LayerShape(layer.num_heads, layer.head_dim, geometry)
    softmax = create_operator(Choice(KEEP), shape).macs(geometry)
    return softmax, {index: each.operator.macs(geometry) for index, each in converted_layers(model).items()}


def resize(model: nn.Module, img_size: int | tuple[int, int]) -> None:
    """Change the image size (height, width) of a model in place, converted or not.

    timm resamples the position embeddings; operators resample the parameters that are tied to the grid, and keep their
    sizes, such as the width of a window.

    Raises UnsupportedModelError: the family has a fixed size, or the patches do not fit.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
    patch = patch_size(model)
    if any(side < least for side, least in zip(size, patch, strict=True)):
        raise UnsupportedModelError(
            f"images of {size[0]}x{size[1]} have no whole patch of {patch[0]}x{patch[1]}: give a larger img_size"
        )
    check_patches(model, size)
    try:
        vit(model).set_input_size(img_size=size)
    except (AttributeError, AssertionError, RuntimeError, ValueError) as error:
        name = type(model).__name__
        raise UnsupportedModelError(f"{name} cannot be resized to {size[0]}x{size[1]}: {error}") from error
    for layer in converted_layers(model).values():
        layer.tokens.geometry = token_layout(model).geometry
        layer.operator.resample(layer.tokens.geometry)


def plan_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the image size (height, width) that the operators were created for; None if it is the model's own."""
    sizes = {layer.tokens.plan_size for layer in converted_layers(model).values()} - {image_size(model)}
    return sizes.pop() if sizes else None


def plan_of(model: nn.Module) -> str | None:
    """Return the layer plan of a converted model; None for other models."""
    layers = [getattr(block, "attn", None) for block in attention_blocks(model)]
    choices = [layer.choice if isinstance(layer, ConvertedAttention) else Choice(KEEP) for layer in layers]
    return plan_text(tuple(choices)) if any(choice.operator != KEEP for choice in choices) else None


def with_plan(architecture: str, arguments: Json, plan: str) -> tuple[str, JsonDict]:
    """Return timm's name and arguments for `architecture` converted by `plan`, which replaces an older plan."""
    given = {key: value for key, value in arguments.items() if key != "plan_size"}
    if architecture == ARCHITECTURE:
        architecture = given.pop("architecture")
    return ARCHITECTURE, {**given, "architecture": architecture, "plan": plan}


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


@register_model
def graftvit_converted(
    pretrained: bool = False,
    *,
    architecture: str,
    plan: str,
    plan_size: tuple[int, int] | None = None,
    cache_dir: str | None = None,
    **arguments: Any,
) -> nn.Module:
    """Create the timm model `architecture` converted by `plan`; `pretrained` loads the weights of its `pretrained_cfg`.

    With `plan_size`, create it at that image size, then resize it to its own.
    """
    made_at = arguments if plan_size is None else {**arguments, "img_size": tuple(plan_size)}
    model = convert(timm.create_model(architecture, pretrained=False, **made_at), plan)
    if plan_size is not None and arguments.get("img_size") is not None:
        resize(model, arguments["img_size"])
    if pretrained:
        channels = arguments.get("in_chans", 3)
        load_pretrained(model, num_classes=vit(model).num_classes, in_chans=channels, cache_dir=cache_dir)
    return model
