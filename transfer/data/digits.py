"""Handwritten digits (1,797 images of 8x8, ten classes): a data set that needs no download.

digits.npz has pixels from 0 to 16, classes, and which images the split `validation` has; digits.txt says where they
are from. scikit-learn's `load_digits` gives the same pixels, its stratified split by the seed 0 the same split.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...checkpoints.class_names import comparable
from ...checkpoints.report import some
from ...models.errors import DataError, did_you_mean
from .image_folder import Header, ImageSource, SourceView

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


@functools.cache
def _read_split(split: str) -> tuple[Places, Pixels, Places]:
    """Return the numbers of a split's images, their pixels and their classes."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        pixels, classes, is_validation = (file[name] for name in ("pixels", "classes", "is_validation"))
    places = np.flatnonzero(~is_validation if split == "train" else is_validation)
    return places, np.rint(pixels[places] * (255 / 16)).astype(np.uint8), classes[places].astype(np.int64)


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


# Labels by name: another split is numbered as the training split is, whatever classes it has images of.

logger = logging.getLogger(__name__)

NAMED = 5
"""How many classes an error names."""
TRAINING = "the training split has no images of: {}; name the class folders alike, or take these away"
MODEL = (
    "the model was not trained for: {}; name the class folders as its label_names are, take these away, or measure "
    "its features with --metrics knn"
)
"""Whose classes these are, in an error."""


def number_by_name(
    source: ImageSource, split: str, names: Sequence[str] | None, owner: str = TRAINING
) -> ImageSource:
    """`source` with a label for each class that is its place in `names`, where both sides name theirs.

    `owner` says in an error whose names these are. Raises DataError: `source` has a class that is not in `names`.
    """
    own = source.class_names
    if own is None or names is None or list(own) == list(names):
        return source
    if not comparable(own, names):
        logger.warning("split %r and its model name classes in other words: they go by number", split)
        return source
    known = {name: label for label, name in enumerate(names)}
    foreign = [name for name in own if name not in known]
    if foreign:
        raise DataError(f"split {split!r} has classes that {owner.format(some(foreign, NAMED))}")
    labels = {label: known[name] for label, name in enumerate(own)}
    return SourceView(source, tuple(names), labels=labels)


# Names of splits: what people call the training and the validation images.

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("val", "valid", "validation", "eval", "evaluation")


def synonyms(split: str) -> tuple[str, ...]:
    """Return the names that mean the same split, this one among them."""
    split = split.split("[")[0]
    return next((names for names in (TRAIN_NAMES, EVAL_NAMES) if split in names), (split,))


def split_folder(root: Path, split: str) -> Path | None:
    """Return the folder of a split, or of a synonym of it; None if it does not exist."""
    return next((root / name for name in (split, *synonyms(split)) if (root / name).is_dir()), None)
