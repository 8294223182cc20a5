"""Data sets of detection and segmentation by the names that `data.dataset` has: coco, ade20k, cityscapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ...checkpoints.files import read_if_there
from ...models.dense import IGNORED
from ...models.errors import DataError, counted, did_you_mean
from ..config import DataConfig
from ..first_checks import check_folder
from .augment import reason_of
from .coco import CocoImages, find_split, require_coder
from .digits import split_folder, synonyms
from .image_folder import find_images, open_image

DenseTask = Literal["detection", "segmentation"]
DENSE_SETS: dict[str, DenseTask]
DENSE_SETS = {"coco": "detection", "ade20k": "segmentation", "cityscapes": "segmentation"}
"""What the labels of a data set are."""
FOLDERS = {"ade20k": ("images", "annotations"), "cityscapes": ("leftImg8bit", "gtFine")}
"""Where images and their labels lie, in a folder for each split."""
ADE20K_CLASSES = 150
CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""The 19 evaluated classes of Cityscapes (arXiv:1604.01685) by their numbers in `*_labelIds.png`."""


class LabelMaps:
    """Images with a label for each pixel, in PNG files of numbers.

    An item is an RGB image and its target: `labels` (H, W) uint8 with 255 where a pixel is ignored, `image_id` and
    `original_size` (height, width).

    Args:
        pairs: The files of each image and of its labels.
        names: The names of the classes.
        table: The class of each number in a file of labels (256,), 255 for those that are ignored.
    """

    task = "segmentation"
    targets: Sequence[int] | None = None
    wide: npt.NDArray[np.bool_] | None = None

    def __init__(
        self, pairs: Sequence[tuple[str, str]], names: Sequence[str], table: npt.NDArray[np.uint8]
    ) -> None:
        self.class_names: Sequence[str] = tuple(names)
        self._pairs, self._table = pairs, table

    def __len__(self) -> int:
        return len(self._pairs)

    def path(self, index: int) -> str:
        return self._pairs[index][0]

    def read(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        """Return an item. Raises DataError for labels that do not fit, and whatever Pillow raises."""
        place, labels = self._pairs[index]
        with open_image(place) as file:
            image = file.convert("RGB")
        with open_image(labels) as file:
            if file.mode not in ("L", "P", "I;16", "I"):
                raise DataError(f"{labels} has pixels of mode {file.mode}, and no number of a class each")
            try:
                numbers = np.asarray(file)
            except (OSError, SyntaxError, ValueError) as error:  # as Pillow's decoders raise them
                raise DataError(f"{labels} is damaged: {reason_of(error)}") from error
        if numbers.shape[::-1] != image.size:
            sizes = [f"{width} x {height}" for width, height in (image.size, numbers.shape[::-1])]
            raise DataError(f"{place} has {sizes[0]} pixels, and {labels} {sizes[1]}")
        if numbers.max(initial=0) >= len(self._table):
            raise DataError(f"{labels} has the number {numbers.max()}; a class is below {len(self._table)}")
        classes = self._table[numbers]
        largest = classes.max(where=classes != IGNORED, initial=0)
        if largest >= len(self.class_names):
            raise DataError(
                f"{labels} has a pixel of class {largest}, and there are {counted(len(self.class_names), 'class')}"
            )
        known = {"image_id": index, "original_size": (image.height, image.width)}
        return image, {"labels": torch.from_numpy(classes), **known}


DenseSource: TypeAlias = CocoImages | LabelMaps


def check_dense(config: DataConfig, splits: Sequence[str | None]) -> DenseTask:
    """Return the task of `data.dataset`.

    Raises DataError: it is no data set of detection or segmentation, a package is missing, or a split is not there.
    """
    if config.dataset not in DENSE_SETS:
        raise DataError(
            f"data.dataset={config.dataset!r} has no objects or labeled pixels; "
            f"{did_you_mean(config.dataset, DENSE_SETS)}"
        )
    check_folder(config)
    if DENSE_SETS[config.dataset] == "detection":
        require_coder()
    for split in splits:
        if split is not None:
            _find_split(config.dataset, Path(str(config.data_path)), split)
    return DENSE_SETS[config.dataset]


def open_dense(config: DataConfig, split: str, *, training: bool, masks: bool = False) -> DenseSource:
    """Return the items of a split of `data.dataset`.

    Args:
        config: The data set and its folder.
        split: Its split, or a word for it: `train` also finds `train2017`.
        training: Whether to train on it: images of COCO without objects are then left out.
        masks: Whether objects have masks.

    Raises:
        DataError: as `check_dense`, or files are missing or damaged.
    """
    check_dense(config, [split])
    root = Path(str(config.data_path))
    source = _open(config, root, split, training=training, masks=masks)
    count = len(source.class_names)
    if config.num_classes not in (None, count):
        raise DataError(
            f"data.num_classes={config.num_classes}, and split {split!r} of {root} has {counted(count, 'class')}"
        )
    return source


def _open(config: DataConfig, root: Path, split: str, *, training: bool, masks: bool) -> DenseSource:
    if config.dataset == "coco":
        return CocoImages(root, split, training=training, masks=masks)
    pairs = _pairs(*_find_split(config.dataset, root, split))
    if config.dataset == "cityscapes":
        table = np.full(256, IGNORED, np.uint8)
        table[list(CITYSCAPES)] = np.arange(len(CITYSCAPES))
        return LabelMaps(pairs, list(CITYSCAPES.values()), table)
    lines = (read_if_there(root / "objectInfo150.txt", refusal=DataError) or "").splitlines()[1:]
    names = [line.split("\t")[-1].strip() for line in lines if line.strip()]
    names = names or [str(number) for number in range(config.num_classes or ADE20K_CLASSES)]
    table = np.append(IGNORED, np.arange(IGNORED)).astype(np.uint8)  # a number is 1 + its class
    return LabelMaps(pairs, names, table)


def _pairs(images: Path, labels: Path) -> list[tuple[str, str]]:
    """Return each image below a folder with its labels, which lie at the same place of another folder."""
    pairs = []
    for image in map(Path, find_images(images).files):
        stem = image.stem.replace("_leftImg8bit", "_gtFine_labelIds")
        pairs.append((str(image), str(labels / image.relative_to(images).with_name(f"{stem}.png"))))
    if not pairs:
        raise DataError(f"there is no image in {images}")
    missing = [label for _, label in pairs if not Path(label).is_file()]
    if missing:
        count = f"{counted(len(missing), 'image')} of the {len(pairs)} in {images}"
        raise DataError(f"{count} have no labels: {missing[0]} is not there")
    return pairs


def _find_split(name: str, root: Path, split: str) -> tuple[Path, Path]:
    """Return the two places of a split of a data set. Raises DataError: one is not there."""
    if name == "coco":
        return find_split(root, split)
    found = []
    for folder in FOLDERS[name]:
        place = split_folder(root / folder, split)
        if place is None:
            names = ", ".join(synonyms(split))
            raise DataError(f"{root / folder} has no folder for split {split!r}, called one of {names}")
        found.append(place)
    return found[0], found[1]
