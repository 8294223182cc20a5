"""Transforms, crops and policies obey the configuration and the model's input."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data import augment as crop
from graftvit.transfer.data.augment import (
    create_mixing,
    eval_transform,
    mix,
    seed_generators,
    train_transform,
    with_settings,
)
from PIL import Image
from support.files.data_sets import image
from timm.data import auto_augment
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor
from torchvision import transforms

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
    "change",
    [
        {"crop_scale": (0.9, 1.0)}, {"hflip": 1.0}, {"aa": "rand-m9"}, {"aa": "affine"}, {"reprob": 1.0},
        {"color_jitter": 0.4}, {"interpolation": "bilinear"},
    ],
    ids=str,
)  # fmt: skip
def test_each_key_changes_the_image(change: dict[str, Any]) -> None:
    plain: dict[str, Any] = {"aa": None, "hflip": 0.0}
    assert not torch.equal(augmented(**plain), augmented(**plain | change))


def test_pixels_are_normalised_as_the_model_wants() -> None:
    white = Image.new("RGB", (40, 52), "white")
    expected = (1 - torch.tensor(RGB.mean)) / torch.tensor(RGB.std)
    for transform in (train_transform(DataConfig(aa=None), RGB), RGB.transform()):
        torch.testing.assert_close(transform(white).amax(dim=(1, 2)), expected)


def test_an_unknown_policy_is_named() -> None:
    for aa in (
        "rnad-m9",
        "rand-m9-strong",
        "rand-m9-tfoo",
        "rand-m9-inc",
        "augmix-m5-tweights",
        "original-std",
    ):
        with pytest.raises(ConfigError, match=rf"data\.aa='{aa}'"):
            train_transform(DataConfig(aa=aa), RGB)
    assert train_transform(DataConfig(aa="rand-m9-n3-tweights-p0.5"), RGB)


def test_settings_stand_above_what_the_weights_say() -> None:
    own = Preprocessing((3, 24, 24), RGB.mean, RGB.std, 0.9, "border", "bilinear")
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
    whole = with_settings(Preprocessing((1, 16, 16), (0.0,), (1.0,), 0.5), DataConfig(aa="affine"))
    assert whole.transform()(image)[0, 0].min() > 0.9


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("keys", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_is_seeded_and_smooths(count: int, keys: dict[str, float]) -> None:
    assert create_mixing(DataConfig(smoothing=0.1), 5) is None
    mixing = create_mixing(DataConfig(smoothing=0.1, **keys), 5)
    assert mixing is not None
    images, targets = torch.rand(count, 3, 8, 6), torch.arange(count) % 5
    first, again = (mix(mixing, images.clone(), targets, 7) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert first[0].shape == images.shape
    torch.testing.assert_close(first[1].sum(dim=1), torch.ones(count))
    assert first[1].min() >= 0.1 / 5 - 1e-6
    if count > 1:
        assert not torch.equal(first[0], images)


SIZES = [(10, 10), (30, 7), (7, 31), (200, 3), (3, 200)]


def crop_spec(
    mode: str, size: tuple[int, int], share: float = 0.7, filter_: str = "bicubic"
) -> Preprocessing:
    return Preprocessing((3, *size), (0.5,) * 3, (0.5,) * 3, share, mode, filter_)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(16, 16), (16, 12)])
@pytest.mark.parametrize("filter_", ["bicubic", "bilinear", "nearest"])
def test_a_part_alone_is_what_the_whole_has(
    mode: str, size: tuple[int, int], filter_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = SIZES[:3] if mode == "border" else SIZES  # which leaves a thin image no row
    for place, (width, height) in enumerate(sizes):
        picture = image(place, 200).resize((width, height))
        wanted = crop_spec(mode, size, filter_=filter_).transform()(picture)
        monkeypatch.setattr(crop, "LARGE", 1 << 25)
        assert torch.equal(eval_transform(crop_spec(mode, size, filter_=filter_))(picture), wanted)
        monkeypatch.setattr(crop, "LARGE", 0)
        part = eval_transform(crop_spec(mode, size, filter_=filter_))(picture)
        assert part.shape == wanted.shape
        # a level of 255 apart where a filter's weights round otherwise
        assert ((part - wanted).abs() > 2.1 / 127.5).float().mean() < (0.1 if filter_ == "nearest" else 0.01)


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_an_image_is_never_made_huge(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """3,000 x 40 was enlarged to 1,680,000 x 22,400 to keep 224 x 224 of it."""

    def huge(*_: Any) -> None:
        raise AssertionError("the whole was made")

    monkeypatch.setattr(transforms.Resize, "forward", huge)
    monkeypatch.setattr(ResizeKeepRatio, "__call__", huge)
    pixels = eval_transform(crop_spec(mode, (224, 224), 0.01))(Image.new("RGB", (3000, 40), (255, 0, 0)))
    assert torch.equal(pixels, torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 224, 224))


ROOT = Path(__file__).parents[3]
TINY_NOISE = np.random.RandomState(0).randint(0, 256, (8, 8, 3), dtype=np.uint8)
KINDS = ["original", "v0", "3a", "rand-m9", "rand-m6-t3aw-inc1", "rand-m20-mmax30-inc1", "augmix-m10-w1-d1"]
"""Of each kind of timm's policies one, of magnitudes that reach both ends and beyond."""
FAMILIES = [
    *KINDS,
    "originalr",
    "v0r",
    "rand-m9-mstd0.5-inc1",
    "rand-m10-inc1-tweights",
    "rand-m5-t3a",
    "augmix-m5-b1",
]


def policies() -> list[str]:
    """What recipes, help and documents name, and one of each kind."""
    texts = [path.read_text() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]]
    texts += [str(field.description) for field in DataConfig.model_fields.values()]
    words = {word for text in texts for word in re.findall(r"\b(?:rand|augmix)-[a-z0-9.-]*\d", text)}
    recipes = [yaml.safe_load(path.read_text()) for path in (ROOT / "cfgs").glob("*.yaml")]
    named = {recipe.get("data", {}).get("aa") for recipe in recipes} - {None, "none", "affine"}
    return sorted({*words, *named, *KINDS, str(DataConfig().aa)})


def policy_step(aa: str, spec: Preprocessing = RGB) -> Any:
    """The step of the training transform that applies the policy."""
    steps = train_transform(DataConfig(aa=aa), spec).transforms  # type: ignore[attr-defined]
    kinds = (auto_augment.RandAugment, auto_augment.AutoAugment, auto_augment.AugMixAugment)
    (found,) = [step for step in steps if isinstance(step, kinds)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("aa", policies())
def test_5_000_draws_of_a_policy_give_images(aa: str) -> None:
    step, image = policy_step(aa), Image.fromarray(TINY_NOISE)
    seed_generators(0)
    assert {(each.mode, each.size) for each in (step(image) for _ in range(5_000))} == {("RGB", (8, 8))}


def operations(aa: str, spec: Preprocessing = RGB) -> list[Any]:
    step = policy_step(aa, spec)
    nested = step.policy if hasattr(step, "policy") else [step.ops]
    return [operation for row in nested for operation in row]


@pytest.mark.parametrize("spec", [RGB, GRAY])
def test_each_operation_takes_each_magnitude(spec: Preprocessing) -> None:
    image = Image.fromarray(TINY_NOISE).convert("RGB" if spec.input_size[0] == 3 else "L")
    seen = set()
    for aa in FAMILIES:
        for operation in operations(aa, spec):
            operation.prob, operation.magnitude_std, operation.magnitude_max = 1.0, 0.0, 40
            for magnitude in (0, 0.4, 2.5, 5, 7.5, 9.9, 10, 12.5, 30, 40):
                operation.magnitude = magnitude
                assert operation(image).mode == image.mode, (operation.name, magnitude)
            seen.add(operation.name)
    assert seen >= set(auto_augment.NAME_TO_OP) - {"TranslateX", "TranslateY"}  # in no policy


@pytest.mark.parametrize(
    ("aa", "magnitude"), [("rand-m0", 0), ("rand-m10-inc1", 10), ("rand-m15-mmax20-inc1", 15)]
)
def test_no_bits_are_black_and_others_as_timm_has_them(aa: str, magnitude: int) -> None:
    image = Image.fromarray(TINY_NOISE)
    (posterize,) = [each for each in operations(aa) if each.name.startswith("Posterize")]
    posterize.prob = 1.0
    assert not np.asarray(posterize(image)).any()
    posterize.magnitude = 5
    assert np.array_equal(np.asarray(posterize(image)), TINY_NOISE & 0b1100_0000)


def test_timm_keeps_its_own_operations() -> None:
    before = dict(auto_augment.NAME_TO_OP)
    train_transform(DataConfig(), RGB)
    assert before == auto_augment.NAME_TO_OP


def test_a_transform_goes_to_a_process_that_is_spawned() -> None:
    seed_generators(0)
    transform = train_transform(DataConfig(), RGB)
    again = pickle.loads(pickle.dumps(transform))
    seed_generators(1)
    first = transform(Image.fromarray(TINY_NOISE))
    seed_generators(1)
    assert first.equal(again(Image.fromarray(TINY_NOISE)))
