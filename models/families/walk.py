"""The walk through any supported model: its family, its sites, and the refusal of every other model."""

from __future__ import annotations

from typing import cast

from torch import nn

from ..errors import UnsupportedModelError
from .model_types import Block
from .no_attention import NoAttention
from .plain import SUPPORTED, Plain, TokenLayout, attention_blocks, prefix_kinds, refuse_copied
from .pvt import PVTv1, PVTv2
from .site import Family, Site, submodule
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
