"""The registered sizes of PVT (arXiv:2102.12122, table 1), and PVT-Small whose layers attend to every token.

| name           | depths      | parameters |
| -------------- | ----------- | ---------- |
| pvt_tiny       | 2, 2, 2, 2  | 13,229,288 |
| pvt_small      | 3, 4, 6, 3  | 24,485,864 |
| pvt_medium     | 3, 4, 18, 3 | 44,208,104 |
| pvt_large      | 3, 8, 27, 3 | 61,369,320 |
| pvt_small_full | 3, 4, 6, 3  | 20,185,384 |

Counted with 1,000 classes at 224 x 224.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .errors import JsonDict
from .families.pvt import PVT


def described(**more: Any) -> JsonDict:
    """Return timm's configuration of a pyramid for ImageNet-1k without published weights on the hub."""
    return {
        "input_size": (3, 224, 224),
        "num_classes": 1000,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **more,
    }


FOUR: JsonDict = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
"""What `features_only` reads of a pyramid; timm changes the copy that it gets."""


def as_constructor(create: Callable[..., nn.Module], name: str, *more: Any) -> Callable[..., nn.Module]:
    """Return `create(name, *more, ...)` as the constructor of a model, for timm's `register_model`."""
    constructor: Any = partial(create, name, *more)
    constructor.__name__, constructor.__module__ = name, create.__module__
    return constructor


SHAPES: dict[str, JsonDict] = {
    "pvt_tiny": {"depths": (2, 2, 2, 2)},
    "pvt_small": {"depths": (3, 4, 6, 3)},
    "pvt_medium": {"depths": (3, 4, 18, 3)},
    "pvt_large": {"depths": (3, 8, 27, 3)},
    "pvt_small_full": {"depths": (3, 4, 6, 3), "sr_ratios": (1, 1, 1, 1)},
}
default_cfgs = generate_default_cfgs({name: described() for name in SHAPES})


def _create(name: str, shape: JsonDict, /, pretrained: bool = False, **given: Any) -> nn.Module:
    return build_model_with_cfg(PVT, name, pretrained, feature_cfg={**FOUR}, **{**shape, **given})


for _name, _shape in SHAPES.items():
    register_model(as_constructor(_create, _name, _shape))
