"""Pictures with objects for detection and segmentation, made of photographs that packages bring; no download.

Composed scenes (coins, a dahlia, a saucer) are cut out of photographs and put on parts of others. The coins and the
backgrounds that validate are not those that train; the dahlia and the saucer are one object each, which both splits
have. Nuclei are a real picture with the outlines that people drew: its left half trains, its right half validates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import skimage.data
import skimage.measure
import sklearn.datasets
from PIL import Image
from scipy import ndimage

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

KINDS = ("coin", "dahlia", "saucer")
LEAST = 60
"""Pixels of an object that counts; fewer are hidden behind others."""
GROUNDS = {
    "train": ("china.jpg", "rocket.jpg", "astronaut.png", "grass.png", "motorcycle_left.png", "ihc.png"),
    "validation": ("chelsea.png", "gravel.png", "brick.png", "retina.jpg", "hubble_deep_field.jpg"),
}
"""The backgrounds of each split, no picture in both."""


@dataclass(frozen=True)
class Scene:
    """A picture (H, W, 3) with N objects: masks (N, H, W), labels from 0, and which of them are crowds."""

    pixels: Pixels
    masks: Mask
    labels: tuple[int, ...]
    crowds: tuple[bool, ...] = ()

    def boxes(self) -> npt.NDArray[np.float32]:
        """Return x, y, x, y of the visible pixels of each object: (N, 4)."""
        found = [_spans(mask) for mask in self.masks]
        return np.array(found, np.float32).reshape(-1, 4)

    def classes(self) -> Pixels:
        """Return the label of each pixel (H, W), 255 where no object is."""
        painted = np.full(self.pixels.shape[:2], 255, np.uint8)
        for mask, label in zip(self.masks, self.labels, strict=True):
            painted[mask] = label
        return painted


def _spans(mask: Mask) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# Composed scenes.


def composed(
    split: str, count: int, shapes: Sequence[tuple[int, int]] = ((128, 128),), seed: int = 0
) -> list[Scene]:
    """Return scenes of one to five objects, whose (height, width) take turns in `shapes`; scene i depends on (seed, i)
    alone."""
    return [
        _compose(split, shapes[number % len(shapes)], np.random.default_rng([seed, split == "train", number]))
        for number in range(count)
    ]


def _compose(split: str, shape: tuple[int, int], random: np.random.Generator) -> Scene:
    canvas = _ground(split, shape, random)
    masks: list[Mask] = []
    labels: list[int] = []
    for _ in range(random.integers(1, 6)):
        label = int(random.integers(len(KINDS)))
        choices = _cutouts(split)[label]
        placed = _place(canvas, *choices[random.integers(len(choices))], random)
        masks = [mask & ~placed for mask in masks] + [placed]
        labels.append(label)
    seen = [place for place, mask in enumerate(masks) if mask.sum() >= LEAST]
    kept = np.array([masks[place] for place in seen], bool).reshape(-1, *shape)
    return Scene(canvas, kept, tuple(labels[place] for place in seen))


def _ground(split: str, shape: tuple[int, int], random: np.random.Generator) -> Pixels:
    """Return a random part of a background, at least as large as it is shown."""
    names = GROUNDS[split]
    photograph = _photograph(names[random.integers(len(names))])
    height, width = shape
    scale = random.uniform(1, min(photograph.shape[0] / height, photograph.shape[1] / width))
    rows, columns = int(height * scale), int(width * scale)
    top = random.integers(photograph.shape[0] - rows + 1)
    left = random.integers(photograph.shape[1] - columns + 1)
    part = Image.fromarray(photograph[top : top + rows, left : left + columns])
    return np.array(part.resize((width, height), Image.Resampling.BILINEAR))


def _place(canvas: Pixels, pixels: Pixels, mask: Mask, random: np.random.Generator) -> Mask:
    """Blend an object into the canvas, turned, mirrored, resized and lit at random; return where it is seen."""
    angle, longest = float(random.uniform(-30, 30)), int(random.integers(20, 64))
    turned = [
        Image.fromarray(each).rotate(angle, Image.Resampling.BILINEAR, expand=True)
        for each in (pixels, mask.astype(np.uint8) * 255)
    ]
    ratio = longest / max(turned[0].size)
    width, height = (max(8, int(side * ratio)) for side in turned[0].size)
    paint, alpha = (
        np.asarray(each.resize((width, height), Image.Resampling.BILINEAR), float) for each in turned
    )
    if random.random() < 0.5:
        paint, alpha = paint[:, ::-1], alpha[:, ::-1]
    top = int(random.integers(-8, canvas.shape[0] - height + 8))
    left = int(random.integers(-8, canvas.shape[1] - width + 8))
    rows = slice(max(top, 0), min(top + height, canvas.shape[0]))
    columns = slice(max(left, 0), min(left + width, canvas.shape[1]))
    inside = (
        slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left),
    )  # fmt: skip
    share = alpha[inside][..., None] / 255
    lit = np.clip(paint[inside] * random.uniform(0.7, 1.3), 0, 255)
    canvas[rows, columns] = (share * lit + (1 - share) * canvas[rows, columns]).astype(np.uint8)
    seen = np.zeros(canvas.shape[:2], bool)
    seen[rows, columns] = share[..., 0] > 0.5
    return seen


@cache
def _photograph(name: str) -> Pixels:
    folder = sklearn.datasets if name in ("china.jpg", "flower.jpg") else skimage.data
    path = Path(str(folder.__file__)).parent / ("images" if folder is sklearn.datasets else "") / name
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@cache
def _cutouts(split: str) -> dict[int, list[tuple[Pixels, Mask]]]:
    """Return the objects of each label: each third coin validates, the others train."""
    coins = _coins()
    kept = [coin for number, coin in enumerate(coins) if (number % 3 == 0) == (split == "validation")]
    return {0: kept, 1: [_dahlia()], 2: [_saucer()]}


def _coins() -> list[tuple[Pixels, Mask]]:
    """Return the 24 coins: what is brighter than its neighborhood, without holes."""
    pixels = _photograph("coins.png")
    gray = pixels[..., 0].astype(float)
    bright = ndimage.gaussian_filter(gray, 1) > ndimage.uniform_filter(gray, 101) + 8
    numbered, count = ndimage.label(ndimage.binary_fill_holes(ndimage.binary_opening(bright, iterations=2)))
    places = ndimage.find_objects(numbered)
    return [(pixels[places[each]], numbered[places[each]] == each + 1) for each in range(count)]


def _dahlia() -> tuple[Pixels, Mask]:
    """Return the largest orange part of the photograph."""
    pixels = _photograph("flower.jpg")
    red, _, blue = np.moveaxis(pixels.astype(int), 2, 0)
    orange = ndimage.binary_opening((red > 150) & (red > blue + 30), iterations=2)
    numbered, _ = ndimage.label(ndimage.binary_fill_holes(orange))
    largest = int(np.argmax(np.bincount(numbered.ravel())[1:]))
    place = ndimage.find_objects(numbered)[largest]
    return pixels[place], numbered[place] == largest + 1


def _saucer() -> tuple[Pixels, Mask]:
    """Return the saucer with its cup: an ellipse."""
    pixels = _photograph("coffee.png")
    height, width = pixels.shape[:2]
    y, x = np.mgrid[:height, :width]
    mask = ((y / height - 0.507) / 0.455) ** 2 + ((x / width - 0.485) / 0.335) ** 2 <= 1
    left, top, right, bottom = _spans(mask)
    return pixels[top:bottom, left:right], mask[top:bottom, left:right]


# Nuclei.


def nuclei(split: str, count: int, side: int = 64, seed: int = 0) -> list[Scene]:
    """Return square parts of the left half of the picture for training, of the right half for validation."""
    folder = Path(__file__).with_name("nuclei")
    with Image.open(folder / "cells.png") as cells, Image.open(folder / "outlines.png") as outlines:
        bright, numbers = np.asarray(cells), np.asarray(outlines)
    half = slice(0, 128) if split == "train" else slice(128, 256)
    shown = (np.clip(bright[:, half] / 120, 0, 1) ** 0.5 * 255).astype(np.uint8)
    random = np.random.default_rng([seed, split == "train"])
    scenes = []
    for _ in range(count):
        top, left = random.integers(256 - side + 1), random.integers(128 - side + 1)
        part = np.s_[top : top + side, left : left + side]
        here = numbers[:, half][part]
        masks = [here == each for each in np.unique(here) if each and (here == each).sum() >= LEAST // 4]
        pixels = np.repeat(shown[part][..., None], 3, axis=2)
        scenes.append(Scene(pixels, np.array(masks, bool).reshape(-1, side, side), (0,) * len(masks)))
    return scenes


# Data sets in the layouts that people have.


def write_coco(
    root: Path,
    splits: Mapping[str, Sequence[Scene]],
    names: Sequence[str] = KINDS,
    *,
    ids: Sequence[int] | None = None,
    form: str = "rle",
) -> Path:
    """Write `annotations/instances_SPLIT.json` and `SPLIT/` for each split.

    Masks have the `form` rle (compressed), counts (not compressed) or polygons. `ids` are the numbers of the
    categories, 3, 6, 9, ... by default; images have the numbers 10, 11, ....
    """
    numbers = ids or [3 * (place + 1) for place in range(len(names))]
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, scenes in splits.items():
        content: dict[str, Any] = {"images": [], "annotations": []}
        content["categories"] = [
            {"id": number, "name": name} for number, name in zip(numbers, names, strict=True)
        ]
        (root / split).mkdir(exist_ok=True)
        for number, scene in enumerate(scenes, 10):
            height, width = scene.pixels.shape[:2]
            name = f"{number:012d}.png"
            Image.fromarray(scene.pixels).save(root / split / name)
            content["images"].append({"id": number, "file_name": name, "height": height, "width": width})
            content["annotations"] += [
                {"id": 1000 * number + place, "image_id": number, "category_id": numbers[label], **each}
                for place, (label, each) in enumerate(
                    zip(scene.labels, _annotations(scene, form), strict=True)
                )
            ]
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def _annotations(scene: Scene, form: str) -> list[dict[str, Any]]:
    crowds = scene.crowds or (False,) * len(scene.labels)
    return [
        {
            "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            "area": float(mask.sum()),
            "iscrowd": int(crowd),
            "segmentation": counted_rle(mask) if crowd else FORMS[form](mask),
        }
        for (x0, y0, x1, y1), mask, crowd in zip(scene.boxes(), scene.masks, crowds, strict=True)
    ]


def counted_rle(mask: Mask) -> dict[str, Any]:
    """Return how many pixels, down the columns, are outside, inside, outside, ... of the mask."""
    flat = mask.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def compressed_rle(mask: Mask) -> dict[str, Any]:
    """Return the same as COCO's own files write it, in letters."""
    from faster_coco_eval import mask as coder

    coded = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
    letters = coded["counts"]
    return {
        "size": list(mask.shape),
        "counts": letters.decode() if isinstance(letters, bytes) else letters,
    }


def polygons(mask: Mask) -> list[list[float]]:
    """Return the outlines of the parts of the mask as x, y, x, y, ...; holes are filled."""
    padded = np.pad(ndimage.binary_fill_holes(mask), 1).astype(float)
    outlines = skimage.measure.find_contours(padded, 0.5)
    return [(each[:-1, ::-1] - 0.5).round(2).ravel().tolist() for each in outlines if len(each) > 3]


FORMS = {"rle": compressed_rle, "counts": counted_rle, "polygons": polygons}


def write_ade20k(root: Path, splits: Mapping[str, Sequence[Scene]]) -> Path:
    """Write `images/SPLIT/` and `annotations/SPLIT/`: a pixel is its label + 1, or 0 where no object is."""
    for split, scenes in splits.items():
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes):
            Image.fromarray(scene.pixels).save(root / "images" / split / f"{number:08d}.jpg", quality=95)
            painted = scene.classes() + np.uint8(1)  # 255 becomes 0
            Image.fromarray(painted).save(root / "annotations" / split / f"{number:08d}.png")
    return root


def write_cityscapes(root: Path, splits: Mapping[str, Sequence[Scene]], ids: Sequence[int]) -> Path:
    """Write `leftImg8bit/SPLIT/town/` and `gtFine/SPLIT/town/`: a pixel is `ids[label]`, or 0 where no object is."""
    table = np.zeros(256, np.uint8)
    table[: len(ids)] = ids
    for split, scenes in splits.items():
        for folder in ("leftImg8bit", "gtFine"):
            (root / folder / split / "town").mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes):
            stem = f"town_{number:06d}_000019"
            Image.fromarray(scene.pixels).save(
                root / "leftImg8bit" / split / "town" / f"{stem}_leftImg8bit.png"
            )
            labels = Image.fromarray(table[scene.classes()])
            labels.save(root / "gtFine" / split / "town" / f"{stem}_gtFine_labelIds.png")
    return root


def without_objects(scene: Scene) -> Scene:
    """Return the picture as one that nobody has found an object in."""
    return replace(scene, masks=scene.masks[:0], labels=(), crowds=())


def with_crowd(scene: Scene) -> Scene:
    """Return the scene with its first object as a crowd."""
    return replace(scene, crowds=(True, *[False] * (len(scene.labels) - 1)))
