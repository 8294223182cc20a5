"""From a PIL image to a normalized tensor, and from a batch to a mixed one."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment, posterize
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, ResizeKeepRatio
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import ConvertImageDtype, PILToTensor, Resize, ToTensor
from torchvision.transforms import functional as F

from ...checkpoints.preprocessing import Preprocessing
from ...models.errors import ConfigError, DataError
from ..config import DataConfig

# Evaluation's resize and crop as one step, which never makes more of an image than it keeps.

LARGE = 1 << 25
"""Pixels of a resized image, above which only the part that is kept is made."""


class ResizeAndCenterCrop:
    """timm's two steps; of an image that they would make huge, the same part by the same filter.

    A small `crop_pct`, or an image that is long and thin, is enlarged to gigabytes, of which little is kept.
    """

    def __init__(self, resize: Any, crop: Any) -> None:
        self._resize = resize
        self._crop = crop

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = resized(self._resize, image)
        if height * width <= LARGE:
            return self._keep(self._resize(image))
        kept_height, kept_width = (
            min(kept, whole) for kept, whole in zip(self._crop.size, (height, width), strict=True)
        )
        top, left = round((height - kept_height) / 2), round((width - kept_width) / 2)
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + kept_width) * across, (top + kept_height) * down)
        filter_ = Image.Resampling[self._resize.interpolation.name]
        return self._keep(image.resize((kept_width, kept_height), filter_, box))

    def _keep(self, image: Image.Image) -> Image.Image:
        return self._crop(image)


def resized(resize: Resize | ResizeKeepRatio, image: Image.Image) -> tuple[int, int]:
    """Height and width that a step gives an image."""
    if isinstance(resize, ResizeKeepRatio):
        height, width = ResizeKeepRatio.get_params(image, resize.size, resize.longest)
        return int(height), int(width)
    if not isinstance(resize.size, int):
        return int(resize.size[0]), int(resize.size[1])
    height, width = F.get_dimensions(image)[1:]
    long = int(resize.size * max(height, width) / min(height, width))
    return (resize.size, long) if height <= width else (long, resize.size)


# timm's auto-augment policies, with what newer versions of Pillow refuse.


def keep_no_bits(steps: list[Any]) -> None:
    """Let the policy among `steps` posterize to 0 bits, which is black: Pillow 13 raises for it, older ones do not.

    timm asks for it wherever a magnitude reaches an end of its range. The operations of these steps are changed,
    not timm's table of them.
    """
    for operation in operations(steps):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize


def operations(steps: list[Any]) -> Iterator[Any]:
    """Yield the operations (timm's `AugmentOp`) of the policy among the steps of a transform, if there is one."""
    for step in steps:
        if isinstance(step, AutoAugment):
            for row in step.policy:
                yield from row
        elif isinstance(step, RandAugment | AugMixAugment):
            yield from step.ops


def _posterize(image: Image.Image, bits_to_keep: int, **keywords: Any) -> Image.Image:
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep, **keywords)


# The steps of a transform: one that fails is an error of one sentence, which says which and with what setting.

SETTINGS = {
    "RandomResizedCropAndInterpolation": "crop_scale",
    "RandomHorizontalFlip": "hflip",
    "RandAugment": "aa",
    "AutoAugment": "aa",
    "AugMixAugment": "aa",
    "RandomAffine": "aa",
    "ColorJitter": "color_jitter",
    "RandomErasing": "reprob",
    "Resize": "interpolation",
}
"""The setting of `data` that a step of training comes from."""


def training_settings(config: DataConfig) -> dict[str, str]:
    """Return the settings of `config` by the steps that come from them."""
    return {step: f"data.{key}={getattr(config, key)}" for step, key in SETTINGS.items()}


class StepError(DataError):
    """A step that failed on an image; the caller, which knows the image, names it."""


class OperationError(Exception):
    """An operation of an auto-augment policy that failed."""


class Steps(transforms.Compose):
    """As torchvision's `Compose`, raising StepError for whatever a step raises.

    Args:
        name: What the transform is for, as in "the training transform".
        settings: What a step comes from, by its type.
    """

    def __init__(self, steps: Sequence[Callable[[Any], Any]], name: str, settings: Mapping[str, str]) -> None:
        super().__init__(list(steps))
        self._name = name
        self._settings = settings
        for operation in operations(self.transforms):
            operation.aug_fn = partial(_named, operation.name, operation.aug_fn)

    def __call__(self, image: Any) -> Any:
        for step in self.transforms:
            try:
                image = step(image)
            except MemoryError:
                raise
            except Exception as error:  # each library fails in its own way
                kind = type(step).__name__
                setting = f" ({self._settings[kind]})" if kind in self._settings else ""
                reason = error if isinstance(error, OperationError) else reason_of(error)
                raise StepError(f"{kind} of the {self._name} transform{setting} failed: {reason}") from error
        return image

    def split(self) -> tuple[Steps, Steps]:
        """Return the steps from an image to bytes (C, H, W), and those from there on: the same numbers in the end."""
        kinds = ToTensor | MaybeToTensor
        place = next(number for number, step in enumerate(self.transforms) if isinstance(step, kinds))
        first, second = copy.copy(self), copy.copy(self)
        first.transforms = [*self.transforms[:place], PILToTensor()]
        second.transforms = [ConvertImageDtype(torch.float32), *self.transforms[place + 1 :]]
        return first, second


def reason_of(error: Exception) -> str:
    """Return what happened, in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _named(name: str, function: Callable[..., Any], image: Any, *arguments: Any, **keywords: Any) -> Any:
    try:
        return function(image, *arguments, **keywords)
    except MemoryError:
        raise
    except Exception as error:
        raise OperationError(f"{name}: {reason_of(error)}") from error


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


def train_transform(config: DataConfig, spec: Preprocessing) -> Steps:
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
        _check_words(policy or "")
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


def _check_words(policy: str) -> None:
    """Raise ValueError for a word of an auto-augment policy that timm passes over, as it does one without a number."""
    kind, *words = policy.split("-")
    sets = ("tweights", "t3a", "t3aw") if kind == "rand" else ()
    for word in words:
        if word not in sets and (word.startswith("t") or not re.search(r"\d", word)):
            raise ValueError(word)


def _affine(config: DataConfig, spec: Preprocessing) -> Steps:
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


def eval_transform(spec: Preprocessing) -> Steps:
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
