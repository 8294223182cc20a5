"""Conversion of pyramids: which layers a plan changes, and what is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from timm.models.pvt_v2 import Attention as PVTAttention
from timm.models.swin_transformer import WindowAttention as WindowAttentionV1
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from torch import Tensor, nn

from .attention.base import QKV, AttentionOperator, Projections
from .calibration import Finished, calibrate_layers
from .converted import (
    FUSED,
    ConvertedAttention,
    TokenGrid,
    choices_of,
    converted_layers,
    dropped_names,
    initialize,
    kept_rows,
    plan_of,
)
from .errors import ConfigError, JsonDict, UnsupportedModelError, did_you_mean
from .families import Site, check_supported, depths, family_of, is_pyramid, sites
from .grid_hosts import (
    GridHost,
    ReducedHost,
    SwinHost,
    SwinV2Host,
    WindowHost,
    put_attention,
    release_layers,
    remove_attention,
)
from .layer_plan import Choice, check_choice, create_operator
from .map_structure import Size
from .merges import check_equal_stages, merge_deformably
from .plan_syntax import AS_IT_IS, DEFORMABLE, NONE, merge_of_plan, parse_plan
from .plan_syntax import KEEP as SOFTMAX

# Convert the layers of a pyramid: drop what an operator does not need, and give it all tokens of the stage.


class ConvertedGrid(GridHost, ConvertedAttention):
    """A converted layer of a pyramid; `original` is timm's layer without the parts that were dropped."""

    def __init__(
        self,
        original: nn.Module,
        operator: AttentionOperator,
        choice: Choice,
        tokens: TokenGrid,
        kept: Sequence[str],
    ) -> None:
        ConvertedAttention.__init__(self, original, operator, choice, tokens)
        self.is_native = False
        self.kept = tuple(kept)
        self.has_bias = has_bias(original)
        self.gave_up: tuple[str, ...] = ()
        """The parts of the layer that the conversion was told to give up: of `without`."""

    def set_input_size(
        self, feat_size: Size, window_size: Size, always_partition: bool | None = None
    ) -> None:
        """Resample the relative position bias, if there is one, for another grid; windows mean nothing here."""
        if self.has_bias:
            layer: Any = self.original
            layer.set_window_size(tuple(feat_size))


class ConvertedReduced(ReducedHost, ConvertedGrid):
    """A converted layer of PVTv2, or a sub-sampled one of Twins, without the reduction."""


class ConvertedLocal(WindowHost, ConvertedGrid):
    """A converted local layer of Twins, without windows."""


class ConvertedSwin(SwinHost, ConvertedGrid):
    """A converted layer of Swin, without windows and shift; its bias, if it is kept, is of the whole grid."""

    @property
    def window_size(self) -> Size:
        """The grid of the bias: code that resamples tables by timm's names reads it here."""
        layer: Any = self.original
        height, width = layer.window_size
        return height, width

    def grid_bias(self, grid: Size) -> Tensor | None:
        if not self.has_bias:
            return None
        height, width = self.window_size
        if (height, width) != tuple(grid):
            raise UnsupportedModelError(
                f"the relative position bias of this layer is of a grid of {height}x{width} tokens, and the images "
                f"have {grid[0]}x{grid[1]}: resize the model (graftvit.models.conversion.resize), or give up bias"
            )
        return self.relative_bias()


class ConvertedSwinV2(SwinV2Host, ConvertedSwin):
    """A converted layer of Swin V2: still cosine attention with its learned scale."""


CONVERTED: dict[type[nn.Module], type[ConvertedGrid]] = {
    PVTAttention: ConvertedReduced,
    GlobalSubSampleAttn: ConvertedReduced,
    LocallyGroupedAttn: ConvertedLocal,
    WindowAttentionV1: ConvertedSwin,
    WindowAttentionV2: ConvertedSwinV2,
}


def convert_layer(
    attention: nn.Module,
    operator: AttentionOperator,
    choice: Choice,
    tokens: TokenGrid,
    without: Collection[str] = (),
) -> ConvertedGrid:
    """Return the converted layer for timm's `attention`, which is not changed.

    Dropped are reductions, windows and shift, the rows of projections that the operator does not need, and a relative
    position bias that it does not take.
    """
    keep_bias = has_bias(attention) and operator.traits.bias
    kept = tuple(part for part in QKV if part in operator.needs)
    bare = _without_parts(attention, kept, keep_bias)
    if keep_bias:
        bare.set_window_size(tuple(tokens.geometry.grid))
    kind = next(converted for layer, converted in CONVERTED.items() if isinstance(attention, layer))
    layer = kind(bare, operator, choice, tokens, kept)
    if has_bias(attention) and not keep_bias:
        layer.gave_up = ("bias",)
    return layer


def has_bias(attention: nn.Module) -> bool:
    """Return whether a layer adds a relative position bias to its logits."""
    return "relative_position_bias_table" in attention._parameters or "cpb_mlp" in attention._modules


def _without_parts(attention: nn.Module, kept: Sequence[str], keep_bias: bool) -> Any:
    """Return a copy of timm's layer that shares the parts it keeps and lacks the others."""
    bare = copy.copy(attention)
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        bare.__dict__[name] = copy.copy(attention.__dict__[name])
    for name in dropped_names(kept, keep_bias):
        for parts in (bare._modules, bare._parameters, bare._buffers):
            parts.pop(name, None)
    for name in FUSED:
        fused = bare._modules.get(name)
        if fused is not None:
            bare._modules[name] = _rows(fused, name, kept)
    return bare


def _rows(fused: Any, parts: str, kept: Sequence[str]) -> nn.Module | None:
    """Return a fused projection with the kept ones of its equal parts; None without any."""
    if set(parts) <= set(kept):
        return fused  # type: ignore[no-any-return]
    if not set(parts) & set(kept):
        return None
    less = copy.copy(fused)
    less._parameters = {name: _part(tensor, parts, kept) for name, tensor in fused._parameters.items()}
    less.out_features = less.weight.shape[0]
    return less  # type: ignore[no-any-return]


def _part(tensor: nn.Parameter | None, parts: str, kept: Sequence[str]) -> nn.Parameter | None:
    if tensor is None:
        return None
    return nn.Parameter(kept_rows(tensor.detach(), parts, kept), requires_grad=tensor.requires_grad)


PARTS = ("bias",)
"""What `without` can give up."""


def convert_pyramid(
    model: nn.Module,
    plan: str | Mapping[Any, str],
    *,
    weights: str,
    calibration: Tensor | None,
    without: Collection[str],
    seed: int = 0,
    finished: Finished | None = None,
) -> nn.Module:
    """Return a copy of a pyramid with the operators of `plan`, as `conversion.convert` describes."""
    student = release_layers(copy.deepcopy(model))
    check_supported(student, pyramids=True)
    for part in without:
        if part not in PARTS:
            raise ConfigError(f"without={part!r}; {did_you_mean(part, PARTS)}")
    if merge_of_plan(plan, depths(student)) == DEFORMABLE:
        merge_deformably(student)
    changes = _changes(student, plan, weights)
    if calibration is not None:
        check_equal_stages(
            model, student, {site.stage for site, choice in changes.items() if choice.operator != NONE}
        )
    size = family_of(student).image_size(student)
    if not family_of(student).sized_when_built:
        student.img_size = size  # type: ignore[assignment]
    initialize(student, [site.index for site in changes], weights)
    tokens = {site.stage: TokenGrid(student, site.shape.geometry, size) for site in changes}
    first: dict[tuple[str, int], AttentionOperator] = {}
    for site, choice in changes.items():
        if choice.operator == NONE:
            remove_attention(student, site, size)
            continue
        attention = site.block(student).attn
        attention = getattr(attention, "original", attention)
        operator = create_operator(choice, site.shape)
        if weights == "none":
            operator.start_fresh()
        shared = first.setdefault((str(choice), site.stage), operator)  # one grid: that of the stage
        if shared is not operator:
            operator.share(shared)
        check_layer(site, attention, operator, choice, without)
        operator.adopt(Projections(attention))
        layer = convert_layer(
            attention, operator.to(next(attention.parameters())), choice, tokens[site.stage]
        )
        put_attention(student, site, layer)
    if calibration is not None:
        new = {site.index for site in changes}
        layers = {index: layer for index, layer in converted_layers(student).items() if index in new}
        calibrate_layers(sharing_copy(model), layers, calibration, seed=seed, finished=finished)
    return student


def _changes(student: nn.Module, plan: str | Mapping[Any, str], weights: str) -> dict[Site, Choice]:
    """Return the sites that the plan changes.

    Raises UnsupportedModelError: a layer that was converted before would get another operator.
    """
    choices, now = parse_plan(plan, depths(student)), choices_of(student)
    changes: dict[Site, Choice] = {}
    for site, choice, own in zip(sites(student), choices, now, strict=True):
        _check_choice(choice)
        if choice.operator == AS_IT_IS or choice == own:
            continue
        if (
            own.operator not in (AS_IT_IS, SOFTMAX) and choice.operator != NONE
        ):  # softmax reads every projection
            lost = "its attention" if own.operator == NONE else f"what {own} does not need"
            raise UnsupportedModelError(
                f"plan: layer {site.index} was converted to {own} and has lost {lost}, so it cannot become {choice}: "
                f"convert the original model, or keep the layer ('{site.index}: keep')"
            )
        changes[site] = choice
    if weights != "all" and any(choice.operator != AS_IT_IS for choice in now):
        raise UnsupportedModelError(
            f"weights={weights} needs a model that is not converted yet, and layers of this {type(student).__name__} "
            "are: convert the original model"
        )
    return changes


def _check_choice(choice: Choice) -> None:
    if choice.operator not in (AS_IT_IS, NONE):
        check_choice(choice)
    elif choice.options:
        raise ConfigError(
            f"plan: {choice.operator} has no option {next(iter(choice.options))!r}; it has none"
        )


def check_layer(
    site: Site, attention: Any, operator: AttentionOperator, choice: Choice, without: Collection[str] = ()
) -> None:
    """Raise UnsupportedModelError if a layer has a part that the operator does not support."""
    keep = f"keep it ('{site.index}: keep')"
    if has_bias(attention) and not operator.traits.bias and "bias" not in without:
        raise UnsupportedModelError(
            f"plan: layer {site.index} has a relative position bias, which {choice.operator} does not support; give it "
            f"up by --without bias (in Python without=['bias']), or {keep}"
        )
    drop = getattr(attention.attn_drop, "p", 0)
    if drop > 0 and not operator.traits.dropout:
        raise UnsupportedModelError(
            f"plan: layer {site.index} has attn_drop {drop:g}, and {choice.operator} has no map to drop from; build "
            f"the model with attn_drop_rate 0, or {keep}"
        )


def nothing_given_up(model: nn.Module, without: Collection[str]) -> str:
    """Say that a pyramid has nothing of `without` to give up, after the word "without"; empty where it has."""
    if not without or not is_pyramid(model) or family_of(model).relative_bias:
        return ""
    name = type(model).__name__
    return f"without=bias gives up nothing, because {name} has no relative position bias: leave it out"


def sharing_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of `model`, but share its tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def resize_pyramid(model: nn.Module, size: tuple[int, int]) -> None:
    """Change the image size (height, width) of a pyramid in place, converted or not.

    Raises UnsupportedModelError: timm refuses the size.
    """
    try:
        family_of(model).resize(model, size)
    except (AssertionError, RuntimeError, ValueError) as error:
        name = type(model).__name__
        raise UnsupportedModelError(f"{name} cannot be resized to {size[0]}x{size[1]}: {error}") from error
    layers = converted_layers(model)
    for site in sites(model):
        if site.index in layers:
            layers[site.index].tokens.geometry = site.shape.geometry
            layers[site.index].operator.resample(site.shape.geometry)


def pyramid_arguments(model: nn.Module) -> JsonDict:
    """Return the arguments that build a pyramid beside those of its constructor and its plan; none for other models."""
    if not is_pyramid(model):
        return {}
    own = family_of(model).size_arguments(model)
    if plan_of(model) is None:
        return own
    given = {part for layer in converted_layers(model).values() for part in getattr(layer, "gave_up", ())}
    without = [part for part in PARTS if part in given]
    size = family_of(model).image_size(model)
    return {**own, "img_size": size, **({"without": without} if without else {})}
