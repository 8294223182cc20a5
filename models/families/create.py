"""Create a timm model at an image size, also where timm's constructor takes none."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import is_model, model_entrypoint, split_model_name_tag
from torch import nn

from .walk import FAMILIES


def create_timm_model(architecture: str, **arguments: Any) -> nn.Module:
    """Return `timm.create_model(architecture, **arguments)` without pretrained weights.

    A family whose constructor does not take `img_size`, or only checks it, is created and then resized.
    """
    name = split_model_name_tag(architecture)[0]
    module = model_entrypoint(name).__module__ if is_model(name) else ""
    family = next(
        (each for each in FAMILIES if not each.sized_when_built and each.models[0].__module__ == module), None
    )
    size = arguments.pop("img_size", None) if family is not None else None
    model = timm.create_model(architecture, pretrained=False, **arguments)
    if family is not None and size is not None:
        family.resize(model, (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])))
    return model
