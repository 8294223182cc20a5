"""From a PIL image to a normalised tensor, and from a batch to a mixed one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from PIL import Image
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms

from ...models.errors import ConfigError
from ..config import DataConfig

Transform = Callable[[Image.Image], Tensor]

WHOLE_IMAGE_BELOW = 128
"""Pixels a side under which evaluation looks at the whole image: small images have no border to spare."""


@dataclass(frozen=True)
class InputSpec:
    """What a model wants to see: `size` is (C, H, W), `crop_pct` what evaluation keeps of a side."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float | None = None  # by size where None: see `center_crop`

    @property
    def center_crop(self) -> float:
        """MAE's rule: 224 of 256 pixels up to a side of 224, all above it; small images are seen whole."""
        if self.crop_pct is not None:
            return self.crop_pct
        return 0.875 if WHOLE_IMAGE_BELOW <= max(self.size[1:]) <= 224 else 1.0


def train_transform(config: DataConfig, spec: InputSpec) -> Transform:
    """timm's training transform with the keys of `config`; `aa: affine` neither crops nor flips.

    Raises ConfigError for an auto-augment policy that timm does not know.
    """
    policy = None if config.aa in (None, "", "none") else config.aa
    if policy == "affine":
        return _affine(config, spec)
    try:
        transform = create_transform(
            input_size=spec.size,
            is_training=True,
            scale=config.crop_scale,
            hflip=config.hflip,
            color_jitter=cast(float, config.color_jitter or None),  # timm takes None, against its annotation
            auto_augment=policy,
            interpolation=config.interpolation,
            mean=spec.mean,
            std=spec.std,
            re_prob=config.reprob,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"data.aa={config.aa!r} is no policy that timm knows; valid: affine, none, or timm's rand-..., "
            "augmix-..., original, v0, 3a with their options, such as rand-m9-mstd0.5-inc1"
        ) from error
    return cast(Transform, transform)


def _affine(config: DataConfig, spec: InputSpec) -> Transform:
    """Rotation, shift, scale and shear small enough that a handwritten digit stays the same digit."""
    steps: list[Callable[..., object]] = [
        _resize(config, spec),
        transforms.RandomAffine(
            degrees=15,
            translate=(0.1, 0.1),
            scale=(0.85, 1.15),
            shear=10,
            interpolation=transforms.InterpolationMode.BILINEAR,
        ),
        transforms.ToTensor(),
        transforms.Normalize(spec.mean, spec.std),
    ]
    if config.reprob > 0:
        steps.append(RandomErasing(config.reprob, mode="pixel", device="cpu"))
    return cast(Transform, transforms.Compose(steps))


def _resize(config: DataConfig, spec: InputSpec) -> transforms.Resize:
    name = "bicubic" if config.interpolation == "random" else config.interpolation
    return transforms.Resize(list(spec.size[1:]), transforms.InterpolationMode(name))


def eval_transform(config: DataConfig, spec: InputSpec) -> Transform:
    """Resize, centre crop and normalise, as timm evaluates; with `aa: affine`, the whole image."""
    if config.aa == "affine":
        normalise = transforms.Normalize(spec.mean, spec.std)
        whole = transforms.Compose([_resize(config, spec), transforms.ToTensor(), normalise])
        return cast(Transform, whole)
    transform = create_transform(
        input_size=spec.size,
        is_training=False,
        interpolation="bicubic" if config.interpolation == "random" else config.interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=spec.center_crop,
    )
    return cast(Transform, transform)


def seed_generators(seed: int) -> None:
    """Seeds what CPU transforms draw from. Not CUDA's generator, which belongs to the student."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def create_mixing(config: DataConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, or None where both are off; it smooths the labels that it mixes."""
    if config.mixup <= 0 and config.cutmix <= 0:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def mix(mixing: Mixup, images: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Mixed images (B, C, H, W) and soft targets (B, classes), drawn from `seed`.

    timm mixes each image with its mirror in the batch and wants an even number; an odd batch lends its last
    image a twin, which is dropped again.
    """
    seed_generators(seed)
    count = len(images)
    if count % 2:
        images, targets = torch.cat([images, images[-1:]]), torch.cat([targets, targets[-1:]])
    mixed, soft = mixing(images, targets)
    return mixed[:count], soft[:count]
