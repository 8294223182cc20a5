"""Every auto-augment policy that timm has, over as many images as an epoch: with what Pillow refuses today, too."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.augment import seed_generators, train_transform
from PIL import Image
from timm.data import auto_augment

ROOT = Path(__file__).parents[3]
NOISE = np.random.RandomState(0).randint(0, 256, (8, 8, 3), dtype=np.uint8)
RGB = Preprocessing((3, 8, 8), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GRAY = Preprocessing((1, 8, 8), (0.5,), (0.2,))
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
    step, image = policy_step(aa), Image.fromarray(NOISE)
    seed_generators(0)
    assert {(each.mode, each.size) for each in (step(image) for _ in range(5_000))} == {("RGB", (8, 8))}


def operations(aa: str, spec: Preprocessing = RGB) -> list[Any]:
    step = policy_step(aa, spec)
    nested = step.policy if hasattr(step, "policy") else [step.ops]
    return [operation for row in nested for operation in row]


@pytest.mark.parametrize("spec", [RGB, GRAY])
def test_each_operation_takes_each_magnitude(spec: Preprocessing) -> None:
    image = Image.fromarray(NOISE).convert("RGB" if spec.input_size[0] == 3 else "L")
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
    image = Image.fromarray(NOISE)
    (posterize,) = [each for each in operations(aa) if each.name.startswith("Posterize")]
    posterize.prob = 1.0
    assert not np.asarray(posterize(image)).any()
    posterize.magnitude = 5
    assert np.array_equal(np.asarray(posterize(image)), NOISE & 0b1100_0000)


def test_timm_keeps_its_own_operations() -> None:
    before = dict(auto_augment.NAME_TO_OP)
    train_transform(DataConfig(), RGB)
    assert before == auto_augment.NAME_TO_OP


def test_a_transform_goes_to_a_process_that_is_spawned() -> None:
    seed_generators(0)
    transform = train_transform(DataConfig(), RGB)
    again = pickle.loads(pickle.dumps(transform))
    seed_generators(1)
    first = transform(Image.fromarray(NOISE))
    seed_generators(1)
    assert first.equal(again(Image.fromarray(NOISE)))
