"""scikit-learn's digits as a data set."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from graftvit.models.errors import DataError
from graftvit.transfer.data import digits as module
from graftvit.transfer.data.digits import DigitsSource
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def test_the_split_is_fixed_stratified_and_whole() -> None:
    train, validation = DigitsSource("train", "L"), DigitsSource("validation", "L")
    assert (len(train), len(validation)) == (1297, 500)
    paths = {source.path(index) for source in (train, validation) for index in range(len(source))}
    assert len(paths) == 1797
    counts = Counter(validation.targets)
    assert max(counts.values()) - min(counts.values()) <= 3


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_images_are_those_of_scikit_learns_own_functions(
    split: str, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from the file of the package, or by the package where the file is not."""
    digits = load_digits()
    drawn = train_test_split(np.arange(1797), test_size=500, stratify=digits.target, random_state=0)
    expected = np.sort(drawn[split == "validation"])
    if elsewhere:
        monkeypatch.setattr(module, "find_spec", lambda _: None)
    places, pixels, targets = module._read_split.__wrapped__(split)
    assert (places.dtype, pixels.dtype, targets.dtype) == (np.int64, np.uint8, np.int64)
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(targets, digits.target[expected])
    np.testing.assert_array_equal(pixels, np.rint(digits.images[expected] * (255 / 16)).astype(np.uint8))


def test_pixels_and_labels_are_scikit_learns() -> None:
    source = DigitsSource("val", "L")
    digits = load_digits()
    for index in (0, 17, 499):
        place = int(source.path(index)[len("digits[") : -1])
        image, target = source.read(index)
        assert target == digits.target[place]
        assert image.size == (8, 8)
        np.testing.assert_allclose(np.asarray(image) * (16 / 255), digits.images[place], atol=0.04)


def test_the_color_mode_is_the_models() -> None:
    assert DigitsSource("train", "RGB").read(0)[0].mode == "RGB"
    assert DigitsSource("train", "L").read(0)[0].mode == "L"


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="no split 'trian'; did you mean 'train'"):
        DigitsSource("trian", "L")
