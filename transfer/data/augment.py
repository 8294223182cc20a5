"""From a PIL image to a normalized tensor, and from a batch to a mixed one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms

from ...checkpoints.preprocessing import Preprocessing
from ...models.errors import ConfigError
from ..config import DataConfig
from .crop import ResizeAndCenterCrop
from .policies import keep_no_bits
from .steps import Steps, training_settings

Transform = Callable[[Image.Image], Tensor]


def with_settings(own: Preprocessing, config: DataConfig) -> Preprocessing:
    """`own` with what the settings say above it; `aa: affine` looks at the whole image, as in training."""
    whole = {"crop_pct": 1.0, "crop_mode": "squash"} if config.aa == "affine" else {}
    given = {name: getattr(config, name) for name in ("crop_pct", "crop_mode", "interpolation")}
    given = {name: value for name, value in given.items() if value not in (None, "random")}
    return replace(own, **{**whole, **given})


def epoch_repeats(config: DataConfig) -> int:
    """Return how often an epoch shows an image that it shows. Fixed views are shown once."""
    return config.aug_repeats if config.views is None else 1


def train_transform(config: DataConfig, spec: Preprocessing) -> Transform:
    """timm's training transform with the keys of `config`; `aa: affine` neither crops nor flips.

    With `views: 0` it is the transform of evaluation.

    Raises ConfigError for an auto-augment policy that timm does not know.
    """
    if config.views == 0:
        return eval_transform(spec)
    policy = None if config.aa in (None, "", "none") else config.aa
    if policy == "affine":
        return _affine(config, spec)
    try:
        transform = create_transform(
            input_size=spec.input_size,
            is_training=True,
            scale=config.crop_scale,
            hflip=config.hflip,
            color_jitter=config.color_jitter or None,  # type: ignore[arg-type]  # timm takes None
            auto_augment=policy,
            interpolation=config.interpolation or spec.interpolation,
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
    keep_no_bits(transform.transforms)
    return Steps(transform.transforms, "training", training_settings(config))


def _affine(config: DataConfig, spec: Preprocessing) -> Transform:
    """Rotation, shift, scale and shear small enough that a handwritten digit stays the same digit."""
    steps: list[Callable[..., object]] = [
        transforms.Resize(list(spec.input_size[1:]), transforms.InterpolationMode(spec.interpolation)),
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
    return Steps(steps, "training", training_settings(config))


def eval_transform(spec: Preprocessing) -> Transform:
    """timm's own transform of evaluation, without the pixels that it would make and not keep."""
    transform: Any = spec.transform()
    resize, crop, *others = transform.transforms
    how = f"crop_pct={spec.crop_pct:g}, crop_mode={spec.crop_mode}, interpolation={spec.interpolation}"
    steps = [ResizeAndCenterCrop(resize, crop), *others]
    return Steps(steps, "evaluation", {ResizeAndCenterCrop.__name__: how})


def seed_generators(seed: int) -> None:
    """Seed what CPU transforms draw from. Not CUDA's generator, which belongs to the student."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def create_mixing(config: DataConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, or None where both are off; it smooths the labels that it mixes.

    Without classes (0) images are mixed as those of one class.
    """
    if config.mixup <= 0 and config.cutmix <= 0:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=config.smoothing,
        num_classes=max(1, num_classes),
    )


def mix(mixing: Mixup, images: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Mixed images (B, C, H, W) and soft targets (B, classes), drawn from `seed`.

    timm mixes each image with its mirror in the batch and wants an even number; an odd batch lends its last
    image a twin, which is dropped again.
    """
    seed_generators(seed)
    if mixing.num_classes == 1:
        targets = torch.zeros_like(targets)  # also of images without a label
    count = len(images)
    if count % 2:
        images, targets = torch.cat([images, images[-1:]]), torch.cat([targets, targets[-1:]])
    mixed, soft = mixing(images, targets)
    return mixed[:count], soft[:count]
