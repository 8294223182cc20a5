"""Create a timm model at an image size, also where timm's constructor takes none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from timm.models import is_model, model_entrypoint, split_model_name_tag
from torch import nn

from .site import Family
from .walk import FAMILIES


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
