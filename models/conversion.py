"""Conversion: replace the attention operators of a vision transformer, layer by layer.

A converted model is the timm model `graftvit_converted` with the arguments `architecture` and `plan`, so
`timm.create_model` and saved folders rebuild it wherever this package is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from timm.models import load_pretrained, register_model, split_model_name_tag
from torch import Tensor, nn

from .calibration import Finished
from .converted import ConvertedAttention as ConvertedAttention
from .converted import KeptWeights
from .converted import converted_layers as converted_layers
from .converted import new_parameters as new_parameters
from .converted import plan_of as plan_of
from .converted import plan_size as plan_size
from .errors import ConfigError, Json, JsonDict, UnsupportedModelError, check_types
from .families import check_patches, constructor_arguments, create_timm_model, is_pyramid, token_layout, vit
from .families.towers import convert_tower, is_transformers
from .plain_conversion import convert_plain
from .pyramid_conversion import convert_pyramid, pyramid_arguments, resize_pyramid

ARCHITECTURE = "graftvit_converted"


@check_types()
def convert(
    model: nn.Module,
    plan: str | Mapping[Any, str],
    *,
    weights: KeptWeights = "all",
    calibration: Tensor | None = None,
    without: Collection[str] = (),
    seed: int = 0,
    finished: Finished | None = None,
) -> nn.Module:
    """Return a copy of `model` whose layers have the operators of `plan` (`models/layer_plan.py`).

    A converted layer of a plain vision transformer is converted again from its original attention layer. One of a
    pyramid has lost what its operator does not need: it can be kept or removed, and is refused for another operator.

    Args:
        weights: "all" keeps every weight; "mlp" initializes the attention of converted layers again, as timm does for
            the family; "none" initializes every weight again.
        calibration: images (B, 3, H, W), normalized for the model. Operators that can be calibrated are fitted to the
            output of their layer in `model` on these images, unless this increases the error. Operators that must be
            fitted before they can run, such as hash, are fitted to the layer's input.
        without: parts of a pyramid's layers to give up where an operator does not take them: "bias", the relative
            position bias.
        seed: of the draws that fitting makes.
        finished: keeps the layers that are calibrated, so that a conversion that was killed resumes at the next one.

    Raises:
        UnsupportedModelError: the model is not supported, or an operator cannot replace a layer.
        ConfigError: the plan is invalid, or names a layer or operator that does not exist.
    """
    if is_transformers(model):
        if without or calibration is not None:
            word = "without" if without else "calibration"
            raise UnsupportedModelError(
                f"{word} is for models of timm, and {type(model).__name__} is one of transformers: leave it out"
            )
        return convert_tower(model, plan, weights=weights)
    if is_pyramid(model):
        return _marked(
            convert_pyramid(
                model,
                plan,
                weights=weights,
                calibration=calibration,
                without=without,
                seed=seed,
                finished=finished,
            )
        )
    if without:
        raise ConfigError(
            f"without={','.join(without)} is for pyramids, and {type(model).__name__} is a plain vision transformer: "
            "leave it out"
        )
    return _marked(
        convert_plain(model, plan, weights=weights, calibration=calibration, seed=seed, finished=finished)
    )


def _marked(model: nn.Module) -> nn.Module:
    """Return a converted model whose state dict, and whose description for timm, say what it is."""
    for layer in converted_layers(model).values():
        layer.mark()
    name_for_timm(model, with_own_plan)
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


def resize(model: nn.Module, img_size: int | tuple[int, int]) -> None:
    """Change the image size (height, width) of a model in place, converted or not.

    timm resamples the position embeddings; operators resample the parameters that are tied to the grid, and keep their
    sizes, such as the width of a window.

    Raises UnsupportedModelError: the family has a fixed size, or the patches do not fit.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
    check_patches(model, size)
    if is_pyramid(model):
        resize_pyramid(model, size)
        _rename(model)
        return
    try:
        vit(model).set_input_size(img_size=size)
    except (AttributeError, AssertionError, RuntimeError, ValueError) as error:
        name = type(model).__name__
        raise UnsupportedModelError(f"{name} cannot be resized to {size[0]}x{size[1]}: {error}") from error
    for layer in converted_layers(model).values():
        layer.tokens.geometry = token_layout(model).geometry
        layer.operator.resample(layer.tokens.geometry)
    _rename(model)


def with_own_plan(model: nn.Module, architecture: str, arguments: Json) -> tuple[str, JsonDict]:
    """Return timm's name and arguments that build `model`: of a converted one, those of the conversion with its plan.

    A model whose plan keeps every layer is timm's own.
    """
    name, own = without_plan(split_model_name_tag(architecture)[0], arguments)
    plan = plan_of(model)
    if plan is None:
        return name, constructor_arguments(name, {**own, **pyramid_arguments(model)})
    of_size = {**pyramid_arguments(model), "plan_size": plan_size(model)}
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
    model = convert(create_timm_model(architecture, **made_at), plan, without=without)
    if plan_size is not None and arguments.get("img_size") is not None:
        resize(model, arguments["img_size"])
    if pretrained:
        channels = arguments.get("in_chans", 3)
        load_pretrained(model, num_classes=vit(model).num_classes, in_chans=channels, cache_dir=cache_dir)
    return model
