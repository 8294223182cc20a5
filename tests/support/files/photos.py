"""A folder of photographs as people have them: tiles of scikit-learn's two JPEGs, in many formats and shapes.

Six classes, each a third of one of the photographs. The tiles reach into the neighboring third, so that no model
names all of them; the small tiles differ enough for a small model to name more than by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = ("flower_left", "flower_middle", "flower_right", "temple_left", "temple_middle", "temple_right")
SPLITS = {"train": 12, "validation": 10}
"""Images of each class."""
ORIENTATION = 0x0112
"""The EXIF tag that says how the camera was held."""


def make_photo_folder(root: Path) -> Path:
    """`root/train` and `root/validation`, a folder a class; the same bytes each time."""
    for number, (split, count) in enumerate(SPLITS.items()):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            tiles = _tiles(label, np.random.default_rng([number, label]))
            for place in range(count):
                FORMATS[(label + place) % len(FORMATS)](next(tiles), folder / f"{name} {place:02d}")
    return root


@cache
def _photographs() -> list[Image.Image]:
    """The flower and the temple, 640 x 427."""
    temple, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    return [flower, temple]


def _tiles(label: int, random: np.random.Generator) -> Iterator[Image.Image]:
    """Crops around a third of the photograph, 90 to 270 pixels a side."""
    photograph = _photographs()[label // 3]
    while True:
        width, height = random.integers(90, 270, 2)
        middle = (label % 3 + 0.5) / 3 * photograph.width + random.uniform(-80, 80)
        left = int(np.clip(middle - width / 2, 0, photograph.width - width))
        top = int(random.integers(0, photograph.height - height))
        yield photograph.crop((left, top, left + int(width), top + int(height)))


def _save(tile: Image.Image, stem: Path, suffix: str, mode: str = "RGB") -> None:
    tile.convert(mode).save(stem.with_name(stem.name + suffix))


def _save_sized(tile: Image.Image, stem: Path, size: tuple[int, int]) -> None:
    tile.resize(size, Image.Resampling.BICUBIC).save(stem.with_name(stem.name + ".jpg"))


def _save_turned(tile: Image.Image, stem: Path) -> None:
    """As a camera that was held upright writes it: pixels on their side, and a tag."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    tile.transpose(Image.Transpose.ROTATE_90).save(stem.with_name(stem.name + ".JPG"), exif=exif)


def _save_transparent(tile: Image.Image, stem: Path) -> None:
    seen = Image.linear_gradient("L").resize(tile.size)
    Image.merge("RGBA", (*tile.split(), seen)).save(stem.with_name(stem.name + ".png"))


FORMATS: tuple[Callable[[Image.Image, Path], None], ...] = (
    partial(_save, suffix=".jpg"), partial(_save, suffix=".png"), partial(_save, suffix=".jpeg", mode="L"),
    partial(_save, suffix=".jpg", mode="CMYK"), _save_turned, partial(_save, suffix=".png", mode="P"),
    _save_transparent, partial(_save, suffix=".png", mode="LA"), partial(_save_sized, size=(500, 375)),
    partial(_save_sized, size=(3000, 40)), partial(_save, suffix=".jpg"),
    partial(_save, suffix=".png", mode="1"),
)  # fmt: skip
