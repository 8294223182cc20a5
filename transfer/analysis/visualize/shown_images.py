"""The images to look at: which files, and what of each the model sees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ....checkpoints.preprocessing import Preprocessing
from ....models.errors import DataError
from ...data.augment import eval_transform
from ...data.digits import VALIDATION_SIZE, DigitsSource
from ...data.images import open_image

MAX_IMAGES = 16
"""More make a page that no browser likes, and that nobody reads."""
DIGIT = re.compile(r"digits:(\d+)")


@dataclass(frozen=True)
class Shown:
    """An image as the model sees it: `pixels` (H, W, 3) in bytes, after resizing and cropping."""

    name: str
    original: Image.Image
    pixels: NDArray[np.uint8]


def read_images(words: Sequence[str], spec: Preprocessing) -> list[Shown]:
    """Read the images of `words`: files, folders of images, and `digits:N`, test image N of the digits data.

    Raises DataError: there is no such file, it is no image, or there are more than `MAX_IMAGES`.
    """
    found = [each for word in words for each in _find(word)]
    if not found:
        raise DataError("no image is given; name files, folders of images, or digits:0")
    if len(found) > MAX_IMAGES:
        raise DataError(
            f"{len(found)} images are given and at most {MAX_IMAGES} fit a page; name fewer of them"
        )
    names = _distinct([re.sub(r"[^\w.-]", "_", name) for name, _ in found])
    shown = []
    for name, (_, source) in zip(names, found, strict=True):
        original = _read(source)
        shown.append(Shown(name, original, to_pixels(to_tensor(original, spec), spec)))
    return shown


def to_tensor(image: Image.Image, spec: Preprocessing) -> Tensor:
    """Return the image as the model of `spec` wants it, (1, C, H, W), by the transform of evaluation."""
    return eval_transform(spec)(image.convert("L" if spec.input_size[0] == 1 else "RGB"))[None]


def _find(word: str) -> list[tuple[str, Path | int]]:
    """Return name and place of each image that a word means; a digit's place is its number."""
    digit = DIGIT.fullmatch(word)
    if digit is not None:
        return [(f"digit_{digit[1]}", int(digit[1]))]
    path = Path(word).expanduser()
    if path.is_dir():
        known = Image.registered_extensions()
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in known)
        if not files:
            raise DataError(f"{word!r} has no image in it; name a folder of image files")
        return [(file.stem, file) for file in files]
    if not path.is_file():
        raise DataError(f"{word!r} is no image file and no folder; valid are both, and digits:0")
    return [(path.stem, path)]


def _read(source: Path | int) -> Image.Image:
    if isinstance(source, int):
        if source >= VALIDATION_SIZE:
            raise DataError(f"digits:{source} does not exist; the test images are 0 to {VALIDATION_SIZE - 1}")
        image, _ = DigitsSource("validation", "RGB").read(source)
        return image
    try:
        with open_image(source) as image:
            converted: Image.Image = image.convert("RGB")
            return converted
    except (DataError, UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{str(source)!r} cannot be read as an image; give a PNG, JPEG or the like"
        ) from error


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, with a number behind those that were there before."""
    seen: dict[str, int] = {}
    distinct = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        distinct.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return distinct


def to_pixels(image_1CHW: Tensor, spec: Preprocessing) -> NDArray[np.uint8]:
    """Return a normalized image as bytes (H, W, 3)."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    picture = (image_1CHW[0] * std + mean).clamp(0, 1).expand(3, -1, -1)
    array: NDArray[np.uint8] = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    return array
