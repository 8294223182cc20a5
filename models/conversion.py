"""Conversion: replace the attention operators of a vision transformer, layer by layer.

A converted model is the timm model `graftvit_converted` with the arguments `architecture` and `plan`, so
`timm.create_model` and saved folders rebuild it wherever this package is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from timm.models import load_pretrained, register_model, split_model_name_tag
from torch import Tensor, nn

from .attention.base import QKV, AttentionOperator, Projections
from .calibration import Finished, calibrate_layers
from .converted import (
    FUSED,
    ConvertedGrid,
    KeptWeights,
    TokenGrid,
    choices_of,
    converted_kind,
    dropped_names,
    initialize,
    kept_rows,
)
from .converted import ConvertedAttention as ConvertedAttention
from .converted import converted_layers as converted_layers
from .converted import new_parameters as new_parameters
from .converted import plan_of as plan_of
from .converted import plan_size as plan_size
from .errors import ConfigError, Json, JsonDict, UnsupportedModelError, check_types, did_you_mean
from .families import (
    Family,
    Site,
    check_patches,
    check_supported,
    constructor_arguments,
    create_timm_model,
    family_of,
    find_family,
    plan_depth,
    refuse_hooks,
    refuse_replaced,
    sites,
    vit,
)
from .given import HoldsBody, Model, as_model, check_images, opened
from .host import AttentionHost, has_bias
from .hosting import put_attention, release_attention, remove_attention
from .layer_plan import Choice, check_choice, create_operator
from .merges import check_equal_stages, merge_deformably
from .plan_syntax import AS_IT_IS, DEFORMABLE, KEEP, NONE, merge_of_plan, parse_plan

ARCHITECTURE = "graftvit_converted"
M = TypeVar("M", bound=nn.Module)


@check_types("calibration")
def convert(
    model: Model,
    plan: str | Mapping[Any, str],
    *,
    weights: KeptWeights = "all",
    calibration: Tensor | None = None,
    without: Collection[str] = (),
    seed: int = 0,
    finished: Finished | None = None,
) -> nn.Module:
    """Return a copy of `model`, or of what it holds or names, whose layers have the operators of `plan`.

    A detector or segmenter keeps its neck and head, which stand on its converted backbone.
    A vision tower of transformers becomes another one of its class, with the plan in its configuration.
    A model of which every weight is frozen, as `load_pretrained` gives it, becomes one of which every weight learns.
    A converted layer of a plain vision transformer is converted again from its original attention layer. One of a
    pyramid has lost what its operator does not need: it can be kept or removed, and is refused for another operator.

    Args:
        model: of timm or of transformers, or what holds or names one, as of `graftvit.as_model`.
        plan: the operator of each layer, as text, `*: linear; 9-11: softmax`, or by number, `{0: "linear"}`.
        weights: "all" keeps every weight; "mlp" initializes the attention of converted layers again, as timm does for
            the family; "none" initializes every weight again.
        calibration: images (B, 3, H, W), normalized for the model. Operators that can be calibrated are fitted to the
            output of their layer in `model` on these images, unless this increases the error. Operators that must be
            fitted before they can run, such as hash, are fitted to the layer's input.
        without: parts of a pyramid's layers to give up where an operator does not take them: "bias", the relative
            position bias.
        seed: of what is drawn: random features, new weights, and the draws that fitting makes.
        finished: keeps the layers that are calibrated, so that a conversion that was killed resumes at the next one.

    Raises:
        UnsupportedModelError: the model is not supported, or an operator cannot replace a layer.
        ConfigError: the plan is invalid, or names a layer or operator that does not exist.
        DataError: the calibration images do not fit the model.
    """
    model = opened(model)  # type: ignore[assignment]
    if isinstance(model, HoldsBody) and not isinstance(model, type):
        how: Any = {"weights": weights, "calibration": calibration, "without": without, "seed": seed}
        return model.on(convert(model.to_model(), plan, finished=finished, **how))
    model = as_model(model)
    frozen = not any(each.requires_grad for each in model.parameters())
    if calibration is not None:
        check_images(calibration, model, "calibration", values=True)
    family = find_family(model)
    if without and family is not None and "without" in family.cannot:
        raise ConfigError(f"without={','.join(without)}: a {type(model).__name__} {family.cannot['without']}")
    with _drawing(model, seed):
        student = convert_layers(
            model,
            plan,
            weights=weights,
            calibration=calibration,
            without=without,
            seed=seed,
            finished=finished,
        )
    return _marked(student.requires_grad_(True) if frozen else student)


@contextmanager
def _drawing(model: nn.Module, seed: int) -> Iterator[None]:
    """Draw random numbers by a seed where a model is, and leave the global random state as it was."""
    devices = {each.device.index for each in model.parameters() if each.is_cuda}
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


PARTS = ("bias",)
"""What `without` can give up."""


def convert_layers(
    model: nn.Module,
    plan: str | Mapping[Any, str],
    *,
    weights: KeptWeights = "all",
    calibration: Tensor | None = None,
    without: Collection[str] = (),
    seed: int = 0,
    finished: Finished | None = None,
) -> nn.Module:
    """Return a copy of a model with the operators of `plan`, as `convert` describes; it is not marked."""
    check_supported(model)
    refuse_hooks(model, "model")
    student = release_attention(restored(copy_model(model)))
    family = family_of(student)
    for part in without:
        if part not in PARTS:
            raise ConfigError(f"without={part!r}; {did_you_mean(part, PARTS)}")
    if merge_of_plan(plan, plan_depth(student)) == DEFORMABLE:
        merge_deformably(student)
    changes = _changes(student, plan, weights)
    if calibration is not None:
        check_equal_stages(
            model, student, {site.stage for site, choice in changes.items() if choice.operator != NONE}
        )
    size = family.image_size(student)
    if not family.sized_when_built:
        student.img_size = size  # type: ignore[assignment]
    initialize(student, [site.index for site in changes], weights)
    tokens = {site.stage: TokenGrid(student, site.shape.geometry, size) for site in changes}
    first: dict[tuple[str, int, int], AttentionOperator] = {}
    for site, choice in changes.items():
        if choice.operator == NONE:
            remove_attention(student, site, size)
            continue
        native = family.host(student, site.block(student))
        operator = create_operator(choice, site.shape)
        if weights == "none":
            operator.start_fresh()
        key = (str(choice), site.stage, site.num_heads)  # one grid: that of the stage
        shared = first.setdefault(key, operator)
        if shared is not operator:
            operator.share(shared)
        _check_layer(student, site, native, operator, choice, without)
        operator.adopt(Projections(native.original, equal_parts=native.cuts_rows))
        like = next(native.original.parameters())
        layer = convert_layer(native, operator.to(like), choice, tokens[site.stage])
        put_attention(student, site, layer)
    if family.takes_any_grid(student):
        for stage, grid in tokens.items():
            family.shows_grid(student, stage).register_forward_hook(grid)
    if calibration is not None:
        new = {site.index for site in changes}
        layers = {index: layer for index, layer in converted_layers(student).items() if index in new}
        calibrate_layers(restored(sharing_copy(model)), layers, calibration, seed=seed, finished=finished)
    return student


def restored(model: nn.Module) -> nn.Module:
    """Put timm's layers back in place of converted ones, where the family keeps all of them; return the model."""
    family = family_of(model)
    if not family.keeps_all:
        return model
    for site in sites(model):
        layer = site.layer(model)
        if isinstance(layer, ConvertedAttention):
            put_attention(model, site, layer.original)
    for stage in range(len(family.paths(model))):
        hooks = family.shows_grid(model, stage)._forward_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, TokenGrid)]:
            del hooks[key]
    return model


def _changes(student: nn.Module, plan: str | Mapping[Any, str], weights: str) -> dict[Site, Choice]:
    """Return the sites that the plan changes.

    Raises UnsupportedModelError: a layer that was converted before would get another operator.
    """
    choices, now = parse_plan(plan, plan_depth(student)), choices_of(student)
    family, changes = family_of(student), dict[Site, Choice]()
    for site, choice, own in zip(sites(student), choices, now, strict=True):
        _check_choice(choice, family)
        if (choice.operator in (AS_IT_IS, family.kept) and not choice.options) or choice == own:
            continue
        if own.operator not in (AS_IT_IS, KEEP) and choice.operator != NONE:  # softmax reads every projection
            lost = "its attention" if own.operator == NONE else f"what {own} does not need"
            raise UnsupportedModelError(
                f"plan: layer {site.index} was converted to {own} and has lost {lost}, so it cannot become {choice}: "
                f"convert the original model, or keep the layer ('{site.index}: keep')"
            )
        changes[site] = choice
    if weights != "all" and any(choice.operator != family.kept for choice in now):
        raise UnsupportedModelError(
            f"weights={weights} needs a model that is not converted yet, and layers of this {type(student).__name__} "
            "are: convert the original model"
        )
    return changes


def _check_choice(choice: Choice, family: Family) -> None:
    if choice.operator == NONE and NONE in family.cannot:
        raise ConfigError(
            f"plan: 'none' takes the attention out of a layer, and a model of {family.name} {family.cannot[NONE]}"
        )
    if choice.operator not in (AS_IT_IS, NONE):
        check_choice(choice)
    elif choice.options:
        raise ConfigError(
            f"plan: {choice.operator} has no option {next(iter(choice.options))!r}; it has none"
        )


def _check_layer(
    model: nn.Module,
    site: Site,
    native: AttentionHost,
    operator: AttentionOperator,
    choice: Choice,
    without: Collection[str],
) -> None:
    """Raise UnsupportedModelError if a layer has a part that the operator does not support."""
    family, traits = family_of(model), operator.traits
    keep = f"keep it ('{site.index}: {family.kept}')"
    if family.has_bias(model, site) and not traits.bias and not set(without) & set(family.gives_up):
        give = "give it up by --without bias (in Python without=['bias']), or " if family.gives_up else ""
        raise UnsupportedModelError(
            f"plan: layer {site.index} has a relative position bias, which {choice.operator} does not support; "
            f"{give}{keep}"
        )
    if operator.output_gate is not None and not native.shows_tokens:
        raise UnsupportedModelError(
            f"plan: gate=true reads the tokens of layer {site.index}, which {type(native.original).__name__} does not "
            f"get in the order of its output; leave it out, or {keep}"
        )
    if native.drop_rate > 0 and not traits.dropout:
        raise UnsupportedModelError(
            f"plan: layer {site.index} has attn_drop {native.drop_rate:g}, and {choice.operator} has no map to drop "
            f"from; build the model with attn_drop_rate 0, or {keep}"
        )
    why = family.why_no_grid(model) if traits.needs_grid else ""
    if why:
        raise UnsupportedModelError(
            f"plan: {choice.operator} needs the whole token grid, and the model {why}, or {keep}"
        )


# A converted layer: drop what an operator does not need, and give it all tokens of the stage.


def convert_layer(
    native: AttentionHost,
    operator: AttentionOperator,
    choice: Choice,
    tokens: TokenGrid,
) -> ConvertedAttention:
    """Return the converted layer for timm's `attention`, which is not changed.

    Unless its family keeps all, dropped are reductions, windows and shift, the rows of projections that the operator
    does not need, and a relative position bias that it does not take.
    """
    attention, kind = native.original, converted_kind(type(native))
    if not issubclass(kind, ConvertedGrid):
        return kind(attention, operator, choice, tokens)
    keep_bias = has_bias(attention) and operator.traits.bias
    kept = tuple(part for part in QKV if part in operator.needs or not native.cuts_rows)
    bare = _without_parts(attention, kept, dropped_names(kept, keep_bias, native.reduction))
    native.prepare(bare)
    layer = kind(bare, operator, choice, tokens, kept)
    if keep_bias:
        layer.fit_bias(tokens.geometry.grid)
    elif has_bias(attention):
        layer.gave_up = ("bias",)
    return layer


def _without_parts(attention: nn.Module, kept: Sequence[str], dropped: Sequence[str]) -> Any:
    """Return a copy of timm's layer that shares the parts it keeps and lacks the others."""
    bare = copy.copy(attention)
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        bare.__dict__[name] = copy.copy(attention.__dict__[name])
    for name in dropped:
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
        return fused
    if not set(parts) & set(kept):
        return None
    less = copy.copy(fused)
    less._parameters = {name: _part(tensor, parts, kept) for name, tensor in fused._parameters.items()}
    setattr(less, "out_channels" if isinstance(less, nn.Conv2d) else "out_features", less.weight.shape[0])
    return less


def _part(tensor: nn.Parameter | None, parts: str, kept: Sequence[str]) -> nn.Parameter | None:
    if tensor is None:
        return None
    return nn.Parameter(kept_rows(tensor.detach(), parts, kept), requires_grad=tensor.requires_grad)


def nothing_given_up(model: nn.Module, without: Collection[str]) -> str:
    """Say that a model has nothing of `without` to give up; empty where it has."""
    if not without or family_of(model).gives_up:
        return ""
    name = type(model).__name__
    return f"without=bias gives up nothing, because {name} has no relative position bias: leave it out"


def forget(model: nn.Module) -> None:
    """Let a model drop what its last forward pass left in it, which cannot be copied."""
    family = find_family(model)
    if family is not None:
        family.forget(model)


def copy_model(model: M, shared: Iterable[Tensor] = ()) -> M:
    """Copy a model except for the tensors `shared`; results of a pass that a hook kept in it leave their graph.

    Raises UnsupportedModelError: a method was replaced by a function, which would run the original.
    """
    refuse_replaced(model, functions=True)
    forget(model)
    held = (each for module in model.modules() for each in vars(module).values())
    kept = (each for each in held if isinstance(each, Tensor) and not each.is_leaf)
    return copy.deepcopy(
        model, {id(each): each.detach() for each in kept} | {id(each): each for each in shared}
    )


def sharing_copy(model: M) -> M:
    """Copy the modules of `model`, but share its tensors."""
    return copy_model(model, [*model.parameters(), *model.buffers()])


def _marked(model: nn.Module) -> nn.Module:
    """Return a converted model whose state dict, and whose description for timm, say what it is."""
    for layer in converted_layers(model).values():
        layer.mark()
    name_for_timm(model, with_own_plan)
    family_of(model).describe_plan(model, plan_of(model))
    return model


def _rename(model: nn.Module) -> None:
    """Describe a resized model to timm with the size that its operators were created for."""
    if (getattr(model, "pretrained_cfg", None) or {}).get("architecture") == ARCHITECTURE:
        name_for_timm(model, with_own_plan)


def name_for_timm(
    model: nn.Module, described: Callable[[nn.Module, str, Json], tuple[str, JsonDict]]
) -> None:
    """Set the architecture and the arguments of `model` that timm's `save_for_hf` writes.

    `described` returns them from the model and what they were before. A model that timm did not create has neither.
    """
    config: Json = getattr(model, "pretrained_cfg", None) or {}
    arguments: Json = getattr(model, "_model_args", {})
    name = config.get("architecture")
    if name is None or (name == ARCHITECTURE and "architecture" not in arguments):
        return
    name, arguments = described(model, name, arguments)
    model.pretrained_cfg = model.default_cfg = {**config, "architecture": name}  # type: ignore[assignment]
    model._model_args = {key: value for key, value in arguments.items() if value is not None}  # type: ignore[assignment]


@check_types()
def resize(model: nn.Module, img_size: int | tuple[int, int]) -> None:
    """Change the image size (height, width) of a model in place, converted or not.

    timm resamples the position embeddings; operators resample the parameters that are tied to the grid, and keep their
    sizes, such as the width of a window.

    Raises UnsupportedModelError: the family has a fixed size, or the patches do not fit.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
    check_patches(model, size)
    try:
        family_of(model).resize(model, size)
    except (AttributeError, AssertionError, RuntimeError, ValueError) as error:
        name = type(model).__name__
        raise UnsupportedModelError(f"{name} cannot be resized to {size[0]}x{size[1]}: {error}") from error
    layers = converted_layers(model)
    for site in sites(model) if layers else ():
        if site.index in layers:
            layers[site.index].tokens.geometry = site.shape.geometry
            layers[site.index].operator.resample(site.shape.geometry)
            if layers[site.index].has_bias:
                layers[site.index].fit_bias(site.shape.geometry.grid)
    _rename(model)


def size_arguments(model: nn.Module) -> JsonDict:
    """Return the arguments that build a model beside those of its constructor and its plan."""
    family = find_family(model)
    if family is None or family.keeps_all:  # its own arguments say its size
        return {}
    own = family.size_arguments(model)
    if plan_of(model) is None:
        return own
    given = {part for layer in converted_layers(model).values() for part in getattr(layer, "gave_up", ())}
    without = [part for part in PARTS if part in given]
    size = family.image_size(model)
    return {**own, "img_size": size, **({"without": without} if without else {})}


def with_own_plan(model: nn.Module, architecture: str, arguments: Json) -> tuple[str, JsonDict]:
    """Return timm's name and arguments that build `model`: of a converted one, those of the conversion with its plan.

    A model whose plan keeps every layer is timm's own.
    """
    name, own = without_plan(split_model_name_tag(architecture)[0], arguments)
    plan = plan_of(model)
    if plan is None:
        return name, constructor_arguments(name, {**own, **size_arguments(model)})
    of_size = {**size_arguments(model), "plan_size": plan_size(model)}
    return ARCHITECTURE, {"architecture": name, "plan": plan, **own, **of_size}


def with_plan(
    architecture: str, arguments: Json, plan: str, without: Collection[str] = ()
) -> tuple[str, JsonDict]:
    """Return timm's name and arguments for `architecture` converted by `plan`, which replaces an older plan."""
    given = {key: value for key, value in arguments.items() if key != "plan_size"}
    if architecture == ARCHITECTURE:
        architecture = given.pop("architecture")
    if without:
        given["without"] = list(without)
    return ARCHITECTURE, {**given, "architecture": architecture, "plan": plan}


def without_plan(architecture: str, arguments: Json) -> tuple[str, JsonDict]:
    """Return timm's own name and arguments of a model whose plan, if it has one, keeps every layer."""
    if architecture != ARCHITECTURE:
        return architecture, dict(arguments)
    of_plan = ("architecture", "plan", "plan_size", "without")
    own = {key: value for key, value in arguments.items() if key not in of_plan}
    return str(arguments["architecture"]), own


@register_model
def graftvit_converted(
    pretrained: bool = False,
    *,
    architecture: str,
    plan: str,
    plan_size: tuple[int, int] | None = None,
    without: Collection[str] = (),
    cache_dir: str | None = None,
    **arguments: Any,
) -> nn.Module:
    """Create the timm model `architecture` converted by `plan`; `pretrained` loads the weights of its `pretrained_cfg`.

    With `plan_size`, create it at that image size, then resize it to its own.
    """
    made_at = arguments if plan_size is None else {**arguments, "img_size": tuple(plan_size)}
    model = _marked(convert_layers(create_timm_model(architecture, **made_at), plan, without=without))
    if plan_size is not None and arguments.get("img_size") is not None:
        resize(model, arguments["img_size"])
    if pretrained:
        channels = arguments.get("in_chans", 3)
        load_pretrained(model, num_classes=vit(model).num_classes, in_chans=channels, cache_dir=cache_dir)
    return model
