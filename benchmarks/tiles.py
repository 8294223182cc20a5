"""Labeled tiles of scikit-learn's two photographs: a data set of color images that needs no download."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = ("flower_left", "flower_middle", "flower_right", "temple_left", "temple_middle", "temple_right")
SPLITS = {"train": 144, "validation": 100}
"""Tiles of each class."""
SIDE = 40
"""Pixels of a saved tile."""


def make_tiles(root: Path) -> Path:
    """Write the tiles to `root/train` and `root/validation`, a folder for each class, unless they are there.

    The class is the third of the photograph that the center of a tile is in, give or take a part of the tile, so
    that classes overlap. Tiles of both splits may share pixels.
    """
    done = root / "complete"
    if done.exists():
        return root
    for number, (split, count) in enumerate(SPLITS.items()):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            tiles = draw_tiles(label, np.random.default_rng([number, label]))
            for place in range(count):
                next(tiles).save(folder / f"{place:03d}.png")
    done.touch()
    return root


def draw_tiles(label: int, random: np.random.Generator) -> Iterator[Image.Image]:
    """Yield squares around a third of a photograph, 60 to 160 pixels a side, made `SIDE` pixels."""
    temple, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    photograph = (flower, temple)[label // 3]
    while True:
        side = int(random.integers(60, 160))
        middle = (label % 3 + 0.5) / 3 * photograph.width + random.uniform(-120, 120)
        left = int(np.clip(middle - side / 2, 0, photograph.width - side))
        top = int(random.integers(0, photograph.height - side))
        tile = photograph.crop((left, top, left + side, top + side))
        yield tile.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
