"""scikit-learn's handwritten digits (1,797 images of 8x8, ten classes): a data set that needs no download."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...models.errors import DataError, did_you_mean
from .images import Header

Places = NDArray[np.int64]
Pixels = NDArray[np.uint8]
VALIDATION_SIZE = 500
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "test": "validation",
}


@functools.cache  # scikit-learn parses a text file each time
def _read_split(split: str) -> tuple[Places, Pixels, Places]:
    """Return the numbers of a split's images, their pixels and their classes."""
    from sklearn.datasets import load_digits  # a second that runs on other data need not wait
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, validation = train_test_split(
        np.arange(len(digits.target)), test_size=VALIDATION_SIZE, stratify=digits.target, random_state=0
    )
    places = np.sort(train if split == "train" else validation)
    pixels = np.rint(digits.images[places] * (255 / 16)).astype(np.uint8)
    return places, pixels, digits.target[places]


class DigitsSource:
    """The digits as PIL images in `mode` (L or RGB).

    Split `validation` has 500 images, `train` the other 1,297; both have each class in the same proportion and
    are always the same images.
    """

    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str, mode: str) -> None:
        if split not in SPLITS:
            raise DataError(f"digits has no split {split!r}; {did_you_mean(split, SPLITS)}")
        self._places, self._pixels, targets = _read_split(SPLITS[split])
        self.targets: list[int] = targets.tolist()
        self._mode = mode

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels[index]).convert(self._mode), self.targets[index]

    def header(self, index: int) -> Header:
        return Header(None, "L", self._pixels[index].shape)

    def path(self, index: int) -> str:
        return f"digits[{self._places[index]}]"
