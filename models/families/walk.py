"""The walk through any supported model: its family, its sites, and the refusal of every other model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import timm
from timm.models import is_model, model_entrypoint, split_model_name_tag
from torch import nn

from ..attention.base import Geometry
from ..errors import UnsupportedModelError
from .plain import (
    SUPPORTED,
    Plain,
    TokenLayout,
    attention_blocks,
    fills,
    image_size,
    patch_size,
    prefix_kinds,
    refuse_copied,
)
from .pvt import PVTv1, PVTv2
from .site import Block, Family, NoAttention, Site, submodule
from .swin import Swin
from .twins import Twins

FAMILIES: tuple[Family, ...] = (Plain(), PVTv2(), PVTv1(), Twins(), Swin())
PYRAMIDS = ", ".join(family.name for family in FAMILIES if family.is_pyramid)


def find_family(model: nn.Module) -> Family | None:
    """Return the family of a model, or None."""
    return next((family for family in FAMILIES if isinstance(model, family.models)), None)


def family_of(model: nn.Module) -> Family:
    """Return the family of a model.

    Raises UnsupportedModelError: the model is of no supported family.
    """
    family = find_family(model)
    if family is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a supported model; supported are {SUPPORTED}, and the pyramids {PYRAMIDS}"
        )
    return family


def is_pyramid(model: nn.Module) -> bool:
    """Return whether a model is of a supported family with several stages."""
    family = find_family(model)
    return family is not None and family.is_pyramid


def sites(model: nn.Module) -> list[Site]:
    """Return all blocks of a model in order, never an empty list for a model that has blocks.

    Raises UnsupportedModelError: the model is of no supported family.
    """
    return list(family_of(model).sites(model))


def blocks_of(model: nn.Module) -> list[Block]:
    """Return all blocks of a model in order; of a model of no supported family, those that look like its blocks."""
    family = find_family(model)
    if family is None or not family.is_pyramid:
        return attention_blocks(model)
    paths = family.paths(model)
    return [cast(Block, submodule(model, path)) for stage in paths for path in stage]


def layout_of(model: nn.Module, site: Site) -> TokenLayout:
    """Return the tokens of the stage of a site; the only prefix token of a pyramid is a class token.

    Raises UnsupportedModelError: the model has no image size.
    """
    geometry = site.shape.geometry
    prefix = ("cls",) * geometry.num_prefix if is_pyramid(model) else prefix_kinds(model)
    return TokenLayout(prefix, geometry.grid)


def depths(model: nn.Module) -> list[int]:
    """Return the number of blocks of each stage.

    Raises UnsupportedModelError: the model is of no supported family.
    """
    return [len(stage) for stage in family_of(model).paths(model)]


def check_supported(model: nn.Module, *, copied: bool = False, pyramids: bool = False) -> None:
    """Raise `UnsupportedModelError` if the model or one of its blocks is not supported.

    A model that copies its teacher's attention is supported only with `copied`: it has no attention of its own to
    convert or to teach. A pyramid is supported only with `pyramids`.
    """
    refuse_copied(model, copied)
    family, name = find_family(model), type(model).__name__
    if family is None:
        also = f", and the pyramids {PYRAMIDS}" if pyramids else ""
        raise UnsupportedModelError(f"{name} is not a supported model; supported are {SUPPORTED}{also}")
    if family.is_pyramid and not pyramids:
        raise UnsupportedModelError(
            f"{name} is a pyramid, which can be converted but is not supported here; supported are {SUPPORTED}"
        )
    for index, block in enumerate(blocks_of(model)):
        attention = getattr(block, "attn", None)
        attention = getattr(attention, "original", attention)  # a host has the layer that it replaces
        if isinstance(attention, NoAttention):
            continue
        if not isinstance(block, family.blocks) or not isinstance(attention, family.attentions):
            part = (
                type(block).__name__
                if attention is None
                else f"{type(block).__name__} with {type(attention).__name__}"
            )
            raise UnsupportedModelError(
                f"block {index} of {name} is a {part}, which is not supported; supported are {SUPPORTED}, "
                "with one softmax attention a block"
            )


# Create a timm model at an image size, also where timm's constructor takes none.


def create_timm_model(name: str, /, **arguments: Any) -> nn.Module:
    """Return `timm.create_model(name, **arguments)` without pretrained weights.

    A family whose constructor does not take `img_size`, or only checks it, is created and then resized.
    """
    family = family_named(name)
    late = family is not None and not family.sized_when_built
    size = arguments.pop("img_size", None) if late else None
    model = timm.create_model(name, pretrained=False, **arguments)
    if family is not None and size is not None:
        family.resize(model, (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])))
    return model


def constructor_arguments(architecture: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return `arguments` as timm's own constructor takes them: without `img_size` where it has no such argument."""
    family = family_named(architecture)
    takes_size = family is None or family.takes_size
    return {key: value for key, value in arguments.items() if takes_size or key != "img_size"}


def family_named(architecture: str) -> Family | None:
    """Return the family of a timm name; None for a name of no supported family."""
    name = split_model_name_tag(architecture)[0]
    module = model_entrypoint(name).__module__ if is_model(name) else ""
    return next((each for each in FAMILIES if any(model.__module__ == module for model in each.models)), None)


# The refusal of image sizes that leave a model without tokens, or with broken patches.


def check_patches(model: nn.Module, size: tuple[int, int] | None = None) -> None:
    """Raise UnsupportedModelError if images of `size` (default: the model's own) have no patch, or a broken one."""
    size = image_size(model) if size is None else size
    patch = patch_size(model)
    if size is not None and any(side < least for side, least in zip(size, patch, strict=True)):
        raise UnsupportedModelError(
            f"images of {size[0]}x{size[1]} have no whole patch of {patch[0]}x{patch[1]}: give a larger img_size"
        )
    if size is not None and not fills(getattr(model, "patch_embed", None), size):
        raise UnsupportedModelError(
            f"images of {size[0]}x{size[1]} are not whole patches of {patch[0]}x{patch[1]}, which a model with "
            "dynamic_img_size needs: give another img_size"
        )
    family = find_family(model)
    if size is not None and family is not None and family.is_pyramid:
        _check_stages(family.geometries(model, size), size)


def _check_stages(stages: list[Geometry], size: tuple[int, int]) -> None:
    empty = next((number for number, stage in enumerate(stages, 1) if min(stage.grid) < 1), None)
    if empty is not None:
        raise UnsupportedModelError(
            f"images of {size[0]}x{size[1]} leave no token in stage {empty}: give a larger img_size"
        )
