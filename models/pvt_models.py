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


NAMES = ("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large", "pvt_small_full")
default_cfgs = generate_default_cfgs({name: described() for name in NAMES})


@register_model
def pvt_tiny(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """PVT-Tiny."""
    return _create("pvt_tiny", pretrained, {"depths": (2, 2, 2, 2)}, arguments)


@register_model
def pvt_small(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """PVT-Small."""
    return _create("pvt_small", pretrained, {"depths": (3, 4, 6, 3)}, arguments)


@register_model
def pvt_medium(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """PVT-Medium."""
    return _create("pvt_medium", pretrained, {"depths": (3, 4, 18, 3)}, arguments)


@register_model
def pvt_large(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """PVT-Large."""
    return _create("pvt_large", pretrained, {"depths": (3, 8, 27, 3)}, arguments)


@register_model
def pvt_small_full(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """PVT-Small without reduction: every layer attends to every token (Pan et al. 2022, arXiv:2105.14217)."""
    shape = {"depths": (3, 4, 6, 3), "sr_ratios": (1, 1, 1, 1)}
    return _create("pvt_small_full", pretrained, shape, arguments)


def _create(name: str, pretrained: bool, shape: JsonDict, given: JsonDict) -> nn.Module:
    features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(PVT, name, pretrained, feature_cfg=features, **{**shape, **given})
