"""What a detector or segmenter finds in the images of a data set, as pictures and a page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure as Drawing
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype, to_image

from ....checkpoints.atomic import write_text
from ....checkpoints.dense_models import load_dense
from ....models.dense import DETECTION
from ....models.dense.dense_model import DenseModel
from ....models.errors import JsonDict
from ...config import RunConfig
from ...data.dense import DenseAugment
from ...data.dense_sets import open_dense
from ..report.ink import Theme, color_of, draw_picture, new_figure
from ..report.rendering import Figure, render_page, write_png

SHOWN = 8
"""Images of a page."""
LEAST = 0.3
"""Score of a box that is drawn."""


def visualize_detections(source: str, config: RunConfig, out: Path) -> Path:
    """Write pictures of what a model finds in the first images of `data.val_split`, and return their page.

    Boxes with a score of `LEAST` are drawn, or the best one of an image without such. Raises GraftError: the model or
    the images cannot be read.
    """
    model = load_dense(source)
    images = open_dense(config.data, config.data.val_split or config.data.train_split, training=False)
    augment = DenseAugment.to_evaluate(model.sides, config.dense)
    figures = []
    for place in range(min(SHOWN, len(images))):
        name = Path(images.path(place)).stem
        figures.append(draw_image(model, f"{place:02}_{name}", images.read(place)[0], augment))
    return write_figures(figures, f"What {source} finds", out)


def write_figures(figures: Sequence[Figure], title: str, out: Path) -> Path:
    """Write pictures and their page, and return that."""
    for figure in figures:
        write_png(figure, out / f"{figure.name}.png")
    write_text(out / "index.html", render_page("report/page.html", title=title, blocks=figures))
    return out / "index.html"


@torch.no_grad()
def draw_image(
    model: DenseModel, name: str, picture: Image.Image | Tensor, augment: DenseAugment | None = None
) -> Figure:
    """Return what is found in a picture, resized by `augment` or as the model says, or in a tensor as it is."""
    image = picture if isinstance(picture, Tensor) else to_image(picture)
    pixels = to_dtype(image, torch.uint8, scale=True).permute(1, 2, 0).numpy(force=True)
    if not isinstance(picture, Tensor):
        augment = augment or DenseAugment.to_evaluate(model.sides)
        image = augment.evaluate(picture, {"labels": torch.empty(0)})[0]
    prepared = model.prepare([image.to(next(model.parameters()).device)])
    (found,) = model.predict(prepared, model.backbone(prepared.tensors), [pixels.shape[:2]])
    found = {key: value.cpu() for key, value in found.items()}
    draw = partial(draw_found, pixels, found, names_of(model))
    return Figure(name, name, _caption(model, found), f"What is found in {name}", draw)


def names_of(model: DenseModel) -> Sequence[str]:
    """Return the names of the classes, or their numbers."""
    return model.class_names or [str(number) for number in range(model.num_classes)]


def _caption(model: DenseModel, found: JsonDict) -> str:
    if model.task == DETECTION:
        shown = f"{len(_shown(found))} of {len(found['boxes'])} boxes"
        return f"{shown} are drawn: those with a score of {LEAST}, or the best one."
    names, labels = names_of(model), found["labels"]
    shares = [f"{names[label]} {(labels == label).float().mean():.0%}" for label in labels.unique().tolist()]
    return f"Pixels of each class: {', '.join(shares)}."


def _shown(found: JsonDict) -> list[int]:
    """Return the boxes to draw, the best at last."""
    scores: Tensor = found["scores"]
    order: list[int] = scores.argsort().tolist()
    return [place for place in order if scores[place] >= LEAST] or order[-1:]


def draw_found(picture: Any, found: JsonDict, names: Sequence[str], theme: Theme) -> Drawing:
    """Draw the boxes and masks of an image (H, W, 3) with their classes and scores, or its labels as colors."""
    height, width = picture.shape[:2]
    figure = new_figure(6.4, 6.4 * height / width)
    axes = figure.subplots()
    draw_picture(axes, picture, (1, 1), None)
    extent = (0, width, height, 0)
    if "boxes" not in found:
        colors = np.array([to_rgba(color_of(label), 0.5) for label in range(len(names))])
        axes.imshow(colors[found["labels"].numpy()], extent=extent, interpolation="nearest")
        return figure
    for place in _shown(found):
        left, top, right, bottom = found["boxes"][place].tolist()
        label = int(found["labels"][place])
        color = color_of(label)
        axes.plot(
            [left, right, right, left, left], [top, top, bottom, bottom, top], color=color, linewidth=1.5
        )
        words = f"{names[label]} {found['scores'][place]:.2f}"
        axes.text(
            left, top, words, fontsize=8, color="white", backgroundcolor=color, va="bottom", clip_on=True
        )
        if "masks" in found:
            mask = found["masks"][place].numpy()[..., None] * np.array(to_rgba(color, 0.4))
            axes.imshow(mask, extent=extent, interpolation="nearest")
    return figure
