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
from typing_extensions import NotRequired, TypedDict

from ...checkpoints.files import read_regular
from ...models.errors import DataError, counted, install_command
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
Id = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Side = Annotated[int, Field(gt=0, lt=1 << 20)]
Pixels = Annotated[float, Field(ge=-1e6, le=1e12)]


class _Image(TypedDict):
    id: Annotated[Id, Field(ge=0)]
    file_name: str
    height: Side
    width: Side


class _Object(TypedDict):
    image_id: Id
    category_id: Id
    bbox: tuple[Pixels, Pixels, Pixels, Pixels]
    area: NotRequired[Pixels]
    iscrowd: NotRequired[Annotated[int, Field(ge=0, le=1)]]


class _Outlined(_Object):
    segmentation: Annotated[bytes, BeforeValidator(to_json)]


class _Category(TypedDict):
    id: Id
    name: str


class _Boxes(TypedDict):
    images: list[_Image]
    annotations: list[_Object]
    categories: list[_Category]


class _Masks(_Boxes):
    annotations: list[_Outlined]  # type: ignore[misc]  # what is not asked for is not kept


def find_split(root: Path, split: str) -> tuple[Path, Path]:
    """Return the file of annotations and the folder of images of a split. Raises DataError: one is not there."""
    names = dict.fromkeys(f"{name}{year}" for name in (split, *synonyms(split)) for year in YEARS)
    files = {name: root / "annotations" / f"instances_{name}.json" for name in names}
    name = next((name for name, file in files.items() if file.exists()), None)
    if name is None:
        raise DataError(
            f"{root / 'annotations'} has no file for split {split!r}: it is called instances_NAME.json, and NAME is "
            f"one of {', '.join(names)}"
        )
    for folder in (root / name, root / "images" / name):
        if folder.is_dir():
            return files[name], folder
    raise DataError(f"{root / name} is not there: the images that {files[name]} describes lie in it")


class CocoImages:
    """The images of a split and their objects, as arrays; images are ordered by their ids, classes by theirs.

    An item is an RGB image and its target: `boxes` (N, 4) x, y, x, y in pixels, `labels` (N,) from 0, `area` (N,),
    `iscrowd` (N,), `masks` (N, H, W) if they are asked for, `image_id` and `original_size` (height, width).

    In training there are no crowds, no empty boxes, no images without an object or with a side below `LEAST_SIDE`.
    Arguments are those of `open_dense`; masks need faster-coco-eval.

    Raises DataError: files are missing or damaged, objects belong to no image or category, boxes are wrong, or there is
    no object.
    """

    task = "detection"
    targets: Sequence[int] | None = None

    def __init__(self, root: Path, split: str, *, training: bool, masks: bool = False) -> None:
        self._file, self._folder = find_split(root, split)
        content = _read(self._file, masks)
        categories, numbers = _by_id(content, "categories", self._file)
        images, self.ids = _by_id(content, "images", self._file)
        self.class_names: Sequence[str] = tuple(each["name"] for each in categories)
        self.sizes = np.array([(each["height"], each["width"]) for each in images], np.int32)
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
        rows = _places(self.ids, objects, "image", self._file)
        order = np.argsort(rows, kind="stable")
        objects, self._rows = [objects[place] for place in order], rows[order]
        self._labels = _places(numbers, objects, "category", self._file)
        given = np.array([each["bbox"] for each in objects])
        self._boxes = np.concatenate((given[:, :2], given[:, :2] + given[:, 2:]), axis=1).astype(np.float32)
        sides = given[:, 2:].prod(1)
        self._area = np.array([each.get("area", area) for each, area in zip(objects, sides, strict=True)])
        self._crowd = np.array([each.get("iscrowd", 0) for each in objects], bool)
        texts = [each["segmentation"] for each in objects] if masks else []
        self._outlines = np.frombuffer(b"".join(texts), np.uint8) if masks else None
        self._ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        self._kept = np.ones(len(objects), bool)

    def _check_boxes(self) -> npt.NDArray[np.float32]:
        """Return the boxes within their images. Raise DataError where many are wrong; warn of a few."""
        clipped = np.clip(self._boxes, 0, np.tile(self.sizes[self._rows][:, ::-1], 2).astype(np.float32))
        self._empty = (clipped[:, 2:] - clipped[:, :2] < 1).any(1)
        wrong = self._rows[self._empty | (np.abs(clipped - self._boxes) > 1).any(1)]
        if len(wrong):
            height, width = self.sizes[wrong[0]]
            problem = (
                f"{self._file}: {len(wrong)} of {len(clipped)} boxes are empty or outside their images, such as one of "
                f"image {self.ids[wrong[0]]} ({width} x {height}); a box is x, y, width, height in pixels"
            )
            if len(wrong) > max(1, WRONG_SHARE * len(clipped)) or self._empty.all():
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
            texts = [self._outlines[slice(*self._ends[number : number + 2])] for number in objects]
            masks = [decode_mask(json.loads(text.tobytes()), height, width) for text in texts]
            target["masks"] = torch.from_numpy(np.array(masks, bool).reshape(-1, height, width))
        return image, target


def require_coder() -> None:
    """Raise DataError where the package that reads masks and scores boxes is missing."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise DataError(
            f"masks and average precision need the package faster-coco-eval: {install_command('dense')}"
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
    try:
        text = read_regular(file, limit=LARGEST, refusal=DataError)
        return TypeAdapter[Any](_Masks if masks else _Boxes).validate_json(text)
    except MemoryError as error:
        size = file.stat().st_size
        raise DataError(f"the memory does not suffice for {file} with its {size:,} bytes") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{file} is damaged, or not COCO's format: {place + ': ' if place else ''}{first['msg']}"
        ) from error


def _by_id(content: Any, part: str, file: Path) -> tuple[list[Any], npt.NDArray[np.int64]]:
    """Return a part in the order of its ids, and these. Raises DataError: it is empty, or an id comes twice."""
    rows = sorted(content[part], key=lambda each: each["id"])
    ids = np.array([each["id"] for each in rows], np.int64)
    if not rows:
        raise DataError(f"{file} has no {part}")
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise DataError(f"{file} has several {part} with the id {twice[0]}")
    return rows, ids


def _places(ids: npt.NDArray[np.int64], objects: list[Any], what: str, file: Path) -> npt.NDArray[np.int64]:
    """Return the place of what each object names among the sorted ids. Raises DataError for one that is not there."""
    found = np.array([each[f"{what}_id"] for each in objects], np.int64)
    places = np.searchsorted(ids, found).clip(max=len(ids) - 1)
    unknown = found[ids[places] != found]
    if len(unknown):
        raise DataError(
            f"{file}: {counted(len(unknown), 'annotation')} of {len(found)} name an unknown {what}, such as "
            f"{what}_id {unknown[0]}"
        )
    return places


def _check_files(folder: Path, names: Sequence[str], file: Path) -> None:
    """Raise DataError for names that lead out of the folder, or to files that are not there; list each folder once."""
    parts = [name.rpartition("/") for name in names]
    for parent, slash, last in parts:
        if ".." in parent.split("/") or (slash and parent[:1] in ("", "/")):
            raise DataError(f"{file}: the file name {parent + slash + last!r} leads out of {folder}")
    places = {parent: folder / parent for parent, _, _ in parts}
    present = {name: set(os.listdir(place)) if place.is_dir() else () for name, place in places.items()}  # noqa: PTH208
    missing = ["".join(each) for each in parts if each[2] not in present[each[0]]]
    if missing:
        raise DataError(
            f"{counted(len(missing), 'image')} of the {len(names)} that {file} names are not in {folder}, such as "
            f"{missing[0]}"
        )
