"""COCO's data set of objects: `annotations/instances_SPLIT.json`, and the images in `SPLIT/`."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import to_json
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from ...checkpoints.files import read_regular
from ...models.errors import DataError, counted
from .digits import synonyms
from .image_folder import open_image

logger = logging.getLogger(__name__)

YEARS = ("", "2017", "2014")
"""What may follow the name of a split."""
LARGEST = 4 << 30
"""Bytes of a file of annotations that is read; COCO's largest has 0.45 of a thousand million."""
LEAST_SIDE = 32
"""Pixels of the shorter side of an image to train on, as published recipes have it."""
WRONG_SHARE = 0.01
"""Share of the boxes that may be empty or outside their images; COCO's own files have a few."""
Count = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(gt=0, lt=1 << 20)]
Pixels = Annotated[float, Field(ge=-1e6, le=1e12)]


class _Image(TypedDict):
    id: Count
    file_name: str
    height: Side
    width: Side


class _Object(TypedDict):
    image_id: int
    category_id: int
    bbox: tuple[Pixels, Pixels, Pixels, Pixels]
    area: NotRequired[Pixels]
    iscrowd: NotRequired[Annotated[int, Field(ge=0, le=1)]]


class _Outlined(_Object):
    segmentation: Annotated[bytes, BeforeValidator(to_json)]


class _Category(TypedDict):
    id: int
    name: str


class _Boxes(TypedDict):
    images: list[_Image]
    annotations: list[_Object]
    categories: list[_Category]


class _Masks(_Boxes):
    annotations: list[_Outlined]  # type: ignore[misc]  # what is not asked for is not kept


def find_split(root: Path, split: str) -> tuple[Path, Path]:
    """Return the file of annotations and the folder of images of a split. Raises DataError: one is not there."""
    names = [f"{name}{year}" for name in (split, *synonyms(split)) for year in YEARS]
    for name in names:
        file = root / "annotations" / f"instances_{name}.json"
        if not file.exists():
            continue
        for folder in (root / name, root / "images" / name):
            if folder.is_dir():
                return file, folder
        raise DataError(f"{root / name} is not there: the images that {file} describes lie in it")
    raise DataError(
        f"{root / 'annotations'} has no file for split {split!r}: it is called instances_NAME.json, and NAME is one of "
        + ", ".join(dict.fromkeys(names))
    )


class CocoImages:
    """The images of a split and their objects, as arrays; images are ordered by their ids, classes by theirs.

    An item is an RGB image and its target: `boxes` (N, 4) x, y, x, y in pixels, `labels` (N,) from 0, `area` (N,),
    `iscrowd` (N,), `masks` (N, H, W) if they are asked for, `image_id` and `original_size` (height, width).

    In training there are no crowds, no empty boxes, no images without an object or with a side below `LEAST_SIDE`.

    Args:
        root: The folder of the data set.
        split: The split, or a word for it: `train` also finds `train2017`.
        training: Whether to train on the images.
        masks: Whether items have masks, which needs faster-coco-eval.

    Raises:
        DataError: files are missing or damaged, objects belong to no image or category, boxes are wrong, or there is
            no object.
    """

    task = "detection"
    targets: Sequence[int] | None = None

    def __init__(self, root: Path, split: str, *, training: bool, masks: bool = False) -> None:
        if masks:
            require_coder()
        self._file, self._folder = find_split(root, split)
        content = _read(self._file, masks)
        categories = sorted(content["categories"], key=lambda each: each["id"])
        self.class_names: Sequence[str] = tuple(each["name"] for each in categories)
        numbers = _distinct([each["id"] for each in categories], "categories", self._file)
        images = sorted(content["images"], key=lambda each: each["id"])
        self.ids = _distinct([each["id"] for each in images], "images", self._file)
        self.sizes = np.array([(each["height"], each["width"]) for each in images], np.int32).reshape(-1, 2)
        self._names = np.array([os.fsencode(each["file_name"]) for each in images], np.bytes_)
        _check_files(self._folder, [each["file_name"] for each in images], self._file)
        self._set_objects(content["annotations"], numbers, masks)
        clipped = self._check_boxes()
        self._shown = np.arange(len(self.ids))
        if training:
            self._boxes = clipped
            self._keep_for_training()

    def _set_objects(self, objects: list[Any], numbers: npt.NDArray[np.int64], masks: bool) -> None:
        if not objects:
            raise DataError(f"{self._file} has no annotations")
        rows = _places(self.ids, [each["image_id"] for each in objects], "image", self._file)
        order = np.argsort(rows, kind="stable")
        objects, self._rows = [objects[place] for place in order], rows[order]
        self._labels = _places(numbers, [each["category_id"] for each in objects], "category", self._file)
        given = np.array([each["bbox"] for each in objects])
        self._boxes = np.concatenate((given[:, :2], given[:, :2] + given[:, 2:]), axis=1).astype(np.float32)
        self._area = np.array(
            [each.get("area", box[2] * box[3]) for each, box in zip(objects, given, strict=True)]
        )
        self._crowd = np.array([each.get("iscrowd", 0) for each in objects], bool)
        texts = [each["segmentation"] for each in objects] if masks else []
        self._outlines = np.frombuffer(b"".join(texts), np.uint8) if masks else None
        self._ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._kept = np.ones(len(objects), bool)

    def _check_boxes(self) -> npt.NDArray[np.float32]:
        """Return the boxes within their images. Raise DataError where many are wrong; warn of a few."""
        clipped = np.clip(self._boxes, 0, np.tile(self.sizes[self._rows][:, ::-1], 2).astype(np.float32))
        self._empty = (clipped[:, 2:] - clipped[:, :2] < 1).any(1)
        wrong = np.flatnonzero(self._empty | (np.abs(clipped - self._boxes) > 1).any(1))
        if not len(wrong):
            return clipped
        row = self._rows[wrong[0]]
        height, width = self.sizes[row]
        problem = (
            f"{self._file}: {len(wrong)} of {len(self._boxes)} boxes are empty or outside their images, such "
            f"as one of image {self.ids[row]} ({width} x {height}); a box is x, y, width, height in pixels"
        )
        if len(wrong) > max(1, WRONG_SHARE * len(self._boxes)) or self._empty.all():
            raise DataError(problem)
        logger.warning("%s", problem)
        return clipped

    def _keep_for_training(self) -> None:
        self._kept = ~(self._crowd | self._empty)
        filled = np.isin(self._shown, self._rows[self._kept])
        self._shown = np.flatnonzero(filled & (self.sizes.min(1) >= LEAST_SIDE))
        if not len(self._shown):
            raise DataError(
                f"{self._file} has no image to train on: each needs an object that is no crowd, and sides of "
                f"{LEAST_SIDE} pixels"
            )

    def __len__(self) -> int:
        return len(self._shown)

    @property
    def wide(self) -> npt.NDArray[np.bool_]:
        """Return which images are at least as wide as tall."""
        height, width = self.sizes[self._shown].T
        return np.asarray(width >= height)

    def counts(self) -> dict[str, Any]:
        """Return the number of objects of each class, and of crowds among them."""
        objects = np.bincount(self._labels, minlength=len(self.class_names)).tolist()
        return {
            "objects": dict(zip(self.class_names, objects, strict=True)),
            "crowds": int(self._crowd.sum()),
        }

    def path(self, index: int) -> str:
        return str(self._folder / os.fsdecode(self._names[self._shown[index]]))

    def read(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        """Return an item. Raises DataError, and whatever Pillow raises for a damaged image."""
        row = int(self._shown[index])
        height, width = map(int, self.sizes[row])
        with open_image(self.path(index)) as file:
            image = file.convert("RGB")
        if image.size != (width, height):
            raise DataError(
                f"{self.path(index)} has {image.width} x {image.height} pixels, and {self._file.name} says {width} x "
                f"{height}"
            )
        start, end = np.searchsorted(self._rows, (row, row + 1))
        objects = start + np.flatnonzero(self._kept[start:end])
        target = {
            "boxes": torch.from_numpy(self._boxes[objects]),
            "labels": torch.from_numpy(self._labels[objects]),
            "area": torch.from_numpy(self._area[objects]).float(),
            "iscrowd": torch.from_numpy(self._crowd[objects]),
            "image_id": int(self.ids[row]),
            "original_size": (height, width),
        }
        if self._outlines is not None:
            target["masks"] = self._masks(objects, height, width)
        return image, target

    def _masks(self, objects: npt.NDArray[np.int64], height: int, width: int) -> Tensor:
        assert self._outlines is not None
        masks = torch.zeros(len(objects), height, width, dtype=torch.bool)
        for place, number in enumerate(objects):
            start = self._ends[number - 1] if number else 0
            text = self._outlines[start : self._ends[number]].tobytes()
            masks[place] = torch.from_numpy(decode_mask(json.loads(text), height, width))
        return masks


def require_coder() -> None:
    """Raise DataError where the package that reads masks and scores boxes is missing."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise DataError(
            "masks and average precision need the package faster-coco-eval: pip install faster-coco-eval (or pip "
            "install 'graftvit[dense]')"
        )


def decode_mask(segmentation: Any, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Return the pixels (height, width) of a mask: polygons, or run lengths, compressed or not. Raises DataError."""
    from faster_coco_eval import mask as coder

    try:
        if isinstance(segmentation, list):
            limits = np.array((width, height))
            outlines = [
                np.clip(np.array(each, float).reshape(-1, 2), 0, limits).ravel().tolist()
                for each in segmentation
                if len(each) >= 6
            ]
            if not outlines:
                return np.zeros((height, width), bool)
            runs = coder.merge(coder.frPyObjects(outlines, height, width))
        elif list(segmentation["size"]) != [height, width]:
            raise ValueError(segmentation["size"])
        elif isinstance(segmentation["counts"], list):
            runs = coder.frPyObjects(segmentation, height, width)
        else:
            runs = segmentation
        return np.asarray(coder.decode(runs), bool)
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"a mask is damaged: it is neither polygons nor run lengths that fill {width} x {height} pixels"
        ) from error


def _read(file: Path, masks: bool) -> Any:
    """Return what a file of annotations says, checked."""
    size = file.stat().st_size
    if size > LARGEST:
        raise DataError(f"{file} has {size:,} bytes; at most {LARGEST:,} are read")
    try:
        text = read_regular(file, limit=size, refusal=DataError)
        return TypeAdapter[Any](_Masks if masks else _Boxes).validate_json(text)
    except MemoryError as error:
        raise DataError(f"the memory does not suffice for {file} with its {size:,} bytes") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{file} is damaged, or not COCO's format: {place + ': ' if place else ''}{first['msg']}"
        ) from error


def _distinct(ids: list[int], what: str, file: Path) -> npt.NDArray[np.int64]:
    """Return sorted ids as an array. Raises DataError: they are missing, or one comes twice."""
    found = np.array(ids, np.int64)
    if not len(found):
        raise DataError(f"{file} has no {what}")
    twice = found[1:][found[1:] == found[:-1]]
    if len(twice):
        raise DataError(f"{file} has several {what} with the id {twice[0]}")
    return found


def _places(ids: npt.NDArray[np.int64], wanted: list[int], what: str, file: Path) -> npt.NDArray[np.int64]:
    """Return the place of each wanted id among the sorted ids. Raises DataError for one that is not there."""
    found = np.array(wanted, np.int64)
    places = np.searchsorted(ids, found).clip(max=len(ids) - 1)
    unknown = np.flatnonzero(ids[places] != found)
    if len(unknown):
        raise DataError(
            f"{file}: {counted(len(unknown), 'annotation')} of {len(found)} name an unknown {what}, such as "
            f"{what}_id {found[unknown[0]]}"
        )
    return places


def _check_files(folder: Path, names: Sequence[str], file: Path) -> None:
    """Raise DataError for names that lead out of the folder, or to files that are not there; list each folder once."""
    present: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, _, last = name.rpartition("/")
        if parent not in present:
            if Path(parent).is_absolute() or ".." in Path(parent).parts:
                raise DataError(f"{file}: the file name {name!r} leads out of {folder}")
            place = folder / parent
            present[parent] = set(os.listdir(place)) if place.is_dir() else set()  # noqa: PTH208
        if last not in present[parent]:
            missing.append(name)
    if missing:
        raise DataError(
            f"{counted(len(missing), 'image')} of the {len(names)} that {file} names are not in {folder}, such as "
            f"{missing[0]}"
        )
