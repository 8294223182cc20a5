"""Transforms obey the configuration and the model's input."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.augment import (
    InputSpec,
    create_mixing,
    eval_transform,
    mix,
    seed_generators,
    train_transform,
)
from PIL import Image
from torch import Tensor

NOISE = np.random.RandomState(0).randint(0, 256, (40, 52, 3), dtype=np.uint8)
RGB = InputSpec((3, 24, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
GREY = InputSpec((1, 24, 32), (0.5,), (0.2,))


def augmented(seed: int = 0, spec: InputSpec = RGB, **keys: Any) -> Tensor:
    image = Image.fromarray(NOISE).convert("RGB" if spec.size[0] == 3 else "L")
    transform = train_transform(DataConfig(**keys), spec)
    seed_generators(seed)
    return transform(image)


@pytest.mark.parametrize("spec", [RGB, GREY])
@pytest.mark.parametrize("aa", [None, "none", "affine", "rand-m9-mstd0.5-inc1", "original", "3a"])
def test_every_policy_gives_the_models_shape_and_depends_on_the_seed_alone(
    spec: InputSpec, aa: str | None
) -> None:
    first = augmented(1, spec, aa=aa, color_jitter=0.2, reprob=0.5)
    assert first.shape == spec.size
    assert torch.equal(first, augmented(1, spec, aa=aa, color_jitter=0.2, reprob=0.5))
    assert not torch.equal(first, augmented(2, spec, aa=aa, color_jitter=0.2, reprob=0.5))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("crop_scale", (0.9, 1.0)),
        ("hflip", 1.0),
        ("aa", "rand-m9"),
        ("aa", "affine"),
        ("reprob", 1.0),
        ("color_jitter", 0.4),
        ("interpolation", "bilinear"),
    ],
)
def test_each_key_changes_the_image(key: str, value: object) -> None:
    plain: dict[str, Any] = {"aa": None, "hflip": 0.0}
    assert not torch.equal(augmented(**plain), augmented(**plain | {key: value}))


def test_pixels_are_normalised_as_the_model_wants() -> None:
    white = Image.new("RGB", (40, 52), "white")
    expected = (1 - torch.tensor(RGB.mean)) / torch.tensor(RGB.std)
    for transform in (train_transform(DataConfig(aa=None), RGB), eval_transform(DataConfig(), RGB)):
        torch.testing.assert_close(transform(white).amax(dim=(1, 2)), expected)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.aa='rnad-m9'"):
        train_transform(DataConfig(aa="rnad-m9"), RGB)


@pytest.mark.parametrize(("side", "kept"), [(32, 1.0), (224, 0.875), (384, 1.0)])
def test_evaluation_crops_as_mae_does_and_sees_small_images_whole(side: int, kept: float) -> None:
    assert InputSpec((3, side, side), RGB.mean, RGB.std).center_crop == kept
    assert InputSpec((3, side, side), RGB.mean, RGB.std, crop_pct=0.9).center_crop == 0.9


def test_affine_evaluation_keeps_the_border() -> None:
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 1))
    seen = eval_transform(DataConfig(aa="affine"), InputSpec((1, 16, 16), (0.0,), (1.0,)))(image)
    assert seen[0, 0].min() > 0.9


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("keys", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_is_seeded_and_smooths(count: int, keys: dict[str, float]) -> None:
    mixing = create_mixing(DataConfig(smoothing=0.1, **keys), 5)  # type: ignore[arg-type]
    assert mixing is not None
    images, targets = torch.rand(count, 3, 8, 6), torch.arange(count) % 5
    first = mix(mixing, images.clone(), targets, 7)
    again = mix(mixing, images.clone(), targets, 7)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[0].shape == images.shape
    torch.testing.assert_close(first[1].sum(dim=1), torch.ones(count))
    assert first[1].min() >= 0.1 / 5 - 1e-6
    if count > 1:
        assert not torch.equal(first[0], images)


def test_no_mixing_leaves_labels_to_the_criterion() -> None:
    assert create_mixing(DataConfig(smoothing=0.1), 5) is None


def test_seeding_reaches_every_generator_of_the_processor() -> None:
    seed_generators(5)
    first = (random.random(), np.random.rand(), torch.rand(1).item())
    seed_generators(5)
    assert first == (random.random(), np.random.rand(), torch.rand(1).item())
