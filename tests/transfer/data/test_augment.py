"""Transforms obey the configuration and the model's input."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.augment import create_mixing, mix, seed_generators, train_transform, with_settings
from PIL import Image
from torch import Tensor

NOISE = np.random.RandomState(0).randint(0, 256, (40, 52, 3), dtype=np.uint8)
RGB = Preprocessing((3, 24, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
GRAY = Preprocessing((1, 24, 32), (0.5,), (0.2,))


def augmented(seed: int = 0, spec: Preprocessing = RGB, **keys: Any) -> Tensor:
    image = Image.fromarray(NOISE).convert("RGB" if spec.input_size[0] == 3 else "L")
    transform = train_transform(DataConfig(**keys), spec)
    seed_generators(seed)
    return transform(image)


@pytest.mark.parametrize("spec", [RGB, GRAY])
@pytest.mark.parametrize("aa", [None, "none", "affine", "rand-m9-mstd0.5-inc1", "original", "3a"])
def test_every_policy_gives_the_models_shape_and_depends_on_the_seed_alone(
    spec: Preprocessing, aa: str | None
) -> None:
    first = augmented(1, spec, aa=aa, color_jitter=0.2, reprob=0.5)
    assert first.shape == spec.input_size
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
    for transform in (train_transform(DataConfig(aa=None), RGB), RGB.transform()):
        torch.testing.assert_close(transform(white).amax(dim=(1, 2)), expected)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.aa='rnad-m9'"):
        train_transform(DataConfig(aa="rnad-m9"), RGB)


def test_settings_stand_above_what_the_weights_say() -> None:
    own = Preprocessing(
        (3, 24, 24), RGB.mean, RGB.std, crop_pct=0.9, crop_mode="border", interpolation="bilinear"
    )
    assert with_settings(own, DataConfig()) == own
    assert with_settings(own, DataConfig(interpolation="random")) == own
    given = {"crop_pct": 0.5, "crop_mode": "center", "interpolation": "bicubic"}
    assert with_settings(own, DataConfig(**given)) == replace(own, **given)
    whole = with_settings(own, DataConfig(aa="affine"))
    assert whole == replace(own, crop_pct=1.0, crop_mode="squash")
    assert with_settings(own, DataConfig(aa="affine", crop_pct=0.5)).crop_pct == 0.5


def test_affine_evaluation_keeps_the_border() -> None:
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 1))
    seen = with_settings(
        Preprocessing((1, 16, 16), (0.0,), (1.0,), 0.5), DataConfig(aa="affine")
    ).transform()(image)
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
