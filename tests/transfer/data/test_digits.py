"""scikit-learn's digits as a data set."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from graftvit.models.errors import DataError
from graftvit.transfer.data.digits import DigitsSource
from sklearn.datasets import load_digits


def test_the_split_is_fixed_stratified_and_whole() -> None:
    train, validation = DigitsSource("train", "L"), DigitsSource("validation", "L")
    assert (len(train), len(validation)) == (1297, 500)
    paths = {source.path(index) for source in (train, validation) for index in range(len(source))}
    assert len(paths) == 1797
    counts = Counter(validation.targets)
    assert max(counts.values()) - min(counts.values()) <= 3


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
