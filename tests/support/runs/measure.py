"""How many images of a folder a model names, by PIL, torch and the given transform alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image


def measure(
    model: Callable[[Any], Any], transform: Callable[[Any], Any], folder: str, mode: str = "RGB"
) -> dict[str, Any]:
    """`right` of `images` and their mean cross-entropy; `folder` holds a folder a class, numbered by name."""
    labels, pictures = read_folder(folder, mode)
    targets = torch.tensor(labels)
    with torch.no_grad():
        logits = torch.cat(
            [model(torch.stack([transform(each) for each in some])) for some in _parts(pictures)]
        )
    right = int((logits.argmax(1) == targets).sum())
    loss = float(torch.nn.functional.cross_entropy(logits.double(), targets))
    return {"right": right, "images": len(labels), "loss": loss}


@cache
def read_folder(folder: str, mode: str = "RGB") -> tuple[list[int], list[Image.Image]]:
    """The label and the picture of each image, by name."""
    labels, pictures = [], []
    for label, of_class in enumerate(sorted(path for path in Path(folder).iterdir() if path.is_dir())):
        for path in sorted(of_class.iterdir()):
            with Image.open(path) as image:
                pictures.append(image.convert(mode))
            labels.append(label)
    return labels, pictures


def _parts(pictures: list[Image.Image], size: int = 30) -> list[list[Image.Image]]:
    return [pictures[start : start + size] for start in range(0, len(pictures), size)]
