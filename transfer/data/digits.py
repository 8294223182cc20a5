"""scikit-learn's handwritten digits (1,797 images of 8x8, ten classes): a data set that needs no download."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ...models.errors import DataError, did_you_mean
from .images import Header

VALIDATION_SIZE = 500
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "test": "validation",
}


class DigitsSource:
    """The digits as PIL images in `mode` (L or RGB).

    Split `validation` has 500 images, `train` the other 1,297; both have each class in the same proportion and
    are always the same images.
    """

    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str, mode: str) -> None:
        if split not in SPLITS:
            raise DataError(f"digits has no split {split!r}; {did_you_mean(split, SPLITS)}")
        from sklearn.datasets import load_digits  # a second that runs on other data need not wait
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, validation = train_test_split(
            np.arange(len(digits.target)), test_size=VALIDATION_SIZE, stratify=digits.target, random_state=0
        )
        self._places = np.sort(train if SPLITS[split] == "train" else validation)
        self._pixels = np.rint(digits.images[self._places] * (255 / 16)).astype(np.uint8)
        self.targets: list[int] = digits.target[self._places].tolist()
        self._mode = mode

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels[index]).convert(self._mode), self.targets[index]

    def header(self, index: int) -> Header:
        return Header(None, "L", self._pixels[index].shape)

    def path(self, index: int) -> str:
        return f"digits[{self._places[index]}]"
