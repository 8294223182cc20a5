"""Give the mean and the standard deviation of the images that a family was trained on."""

from __future__ import annotations

from dataclasses import replace

from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)

from ...models.errors import Json
from ..weights import Weights
from .keymap import Describe

IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
INCEPTION = {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD}
"""One half each: values from -1 to 1."""
NOTE = "normalization: "


def normalized(weights: Weights, statistics: Json, reason: str) -> Weights:
    """`weights` with mean and std, and the one note of the report that says why these."""
    notes = (note for note in weights.notes if not note.startswith(NOTE))
    described = {**weights.pretrained_cfg, **statistics}
    return replace(weights, pretrained_cfg=described, notes=(*notes, NOTE + reason))


def imagenet(families: str) -> Describe:
    """Return a description that knows ImageNet's mean and std of `families` and nothing else."""

    def describe(weights: Weights, config: Json) -> Weights:
        return normalized(weights, IMAGENET, f"ImageNet's, as {families}")

    return describe
