"""Small folders of images for tests: with class folders or without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(
    folder: Path, count: int, *, seed: int = 0, size: int = 10, level: int | None = None
) -> None:
    """`count` gray noise images in `folder`; around the brightness `level` where it is given."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)
    for index in range(count):
        low, high = (0, 255) if level is None else (max(0, level - 30), min(255, level + 30))
        pixels = random.randint(low, high + 1, (size, size)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")


def flat_folder(root: Path, *, train: int = 24, validation: int | None = None) -> Path:
    """Images without class folders; in `train` and `validation` where there are some of the latter."""
    write_images(root / "train" if validation else root, train)
    if validation:
        write_images(root / "validation", validation, seed=1)
    return root


def class_folder(
    root: Path, names: tuple[str, ...] = ("dark", "light"), *, train: int = 8, validation: int = 6
) -> Path:
    """As many images of each class, which differ in brightness; in `train` and `validation`."""
    for place, name in enumerate(names):
        level = 30 + place * 195 // max(1, len(names) - 1)
        write_images(root / "train" / name, train, seed=2 * place, level=level)
        write_images(root / "validation" / name, validation, seed=2 * place + 1, level=level)
    return root
