"""From models and images to a folder: pictures, numbers and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....checkpoints.atomic import write_bytes, write_text
from ....checkpoints.pretrained import Pretrained, load_pretrained
from ....models.errors import ConfigError, TransferError
from ....models.families import check_supported, depths, is_pyramid, sites
from ....models.json_types import JsonDict
from ....models.layer_plan import layer_numbers
from ..report.ink import Array, to_png
from ..report.pages import Plot
from ..report.tables import to_json
from .layer_figures import MapDistance, Numbers, draw_layers
from .look import Look, Summary, check_comparable, cka, divergence, look, token_layouts
from .map_figures import draw_beside, draw_grid
from .map_page import View, check_page_size, embed, layer_names, map_page
from .queries import Query, default_query, read_query
from .shown_images import Shown, read_images, to_tensor

CHART = "Entropy and mean distance of attention by layer, and distance from the teacher where there is one"


def visualize(
    source: str,
    images: Sequence[str],
    out: Path,
    *,
    teacher: str | None = None,
    queries: Sequence[str] = (),
    layers: str = "*",
    **how: Any,
) -> Path:
    """Write pictures (PNG), `numbers.json` and `index.html` to the folder `out`; returns the path of the page.

    Args:
        source: any source of weights, as of `load_pretrained`.
        images: image files, folders of them, `digits:N`.
        teacher: a source to put beside it, at the same image size.
        queries: numbers of patches, row by row from 0, names of prefix tokens, and places `ROWxCOLUMN` in pixels;
            the class token by default, the patch in the middle without one. Patches of a pyramid have no numbers.
        layers: which to show, as in a plan (`0,5,9-11`, `-1`); all by default. Numbers are of all layers.
        how: `model`, `img_size` and the rest, as of `load_pretrained`, for `source`.

    Raises GraftError: a source or image that cannot be read, a layer or query that is not there, models that do
    not go together, or more maps than a page holds.
    """
    loaded = {"student": load_pretrained(source, **how)}
    student = loaded["student"].model
    check_supported(student, copied=True, pyramids=True)
    if teacher is not None:
        loaded["teacher"] = _beside(teacher, loaded["student"])
    chosen = _chosen_layers(student, layers)
    asked = _queries(queries, loaded["student"])
    shown = read_images(images, loaded["student"].preprocessing)
    check_page_size([each.model for each in loaded.values()], len(shown), chosen)
    seen = Seen()
    embedded = []
    for image in shown:
        view = _view(image, loaded)
        seen.add(view.looks)
        embedded.append(embed(view, chosen))
        for query in asked:
            _draw(view, query, chosen, out)
    numbers, comparison, names = seen.numbers(), seen.comparison(), layer_names(view.looks["student"], chosen)
    chart = Plot("layers", "By layer", "", CHART, partial(draw_layers, numbers, comparison))
    write_bytes(out / "layers.png", to_png(chart.draw("light"), ground="white"))
    write_text(out / "numbers.json", to_json(_plain(numbers, comparison)))
    write_text(out / "index.html", map_page(embedded, names, asked[0], chart, _title(source, teacher)))
    return out / "index.html"


def _chosen_layers(student: nn.Module, words: str) -> list[int]:
    """Return the layers to show. Raises ConfigError: one does not exist, or none of them has attention."""
    chosen = layer_numbers(
        words, depths(student) if is_pyramid(student) else sum(depths(student)), "--layers"
    )
    places = sites(student)
    if not any(places[layer].num_heads for layer in chosen):
        raise ConfigError(f"--layers {words}: no layer of these has attention, so there is nothing to show")
    return chosen


def _queries(words: Sequence[str], student: Pretrained) -> list[Query]:
    _, height, width = student.preprocessing.input_size
    layouts = token_layouts(student.model)
    if not words:
        return [default_query(layouts, (height, width))]
    return [read_query(word, layouts, (height, width)) for word in words]


class Seen:
    """Numbers of every image seen so far, by model; maps are dropped, because they are large."""

    def __init__(self) -> None:
        self.looks: dict[str, list[Summary]] = {}
        self.js: list[list[float | None]] = []

    def add(self, looks: dict[str, Look]) -> None:
        """Take the numbers of one image."""
        for name, each in looks.items():
            self.looks.setdefault(name, []).append(each.summary())
        if "teacher" in looks:
            self.js.append(divergence(looks["teacher"], looks["student"]))

    def numbers(self) -> dict[str, Numbers]:
        """Return means over images, teacher last."""
        return {
            name: Numbers(
                _means([each.entropy for each in found]),
                _means([each.distance for each in found]),
                found[0].keys,
                found[0].stages,
            )
            for name, found in self.looks.items()
        }

    def comparison(self) -> MapDistance | None:
        """Return the distance from the teacher; None without one."""
        if not self.js:
            return None
        patches = ([each.patches for each in self.looks[name]] for name in ("teacher", "student"))
        by_layer = ([each for each in layer if each is not None] for layer in zip(*self.js, strict=True))
        return MapDistance([sum(layer) / len(layer) if layer else None for layer in by_layer], cka(*patches))


def _means(images: Sequence[Sequence[Tensor | None]]) -> list[Array | None]:
    """Return the mean over images of each layer's numbers (H); None for a layer without attention."""
    by_layer = ([each for each in layer if each is not None] for layer in zip(*images, strict=True))
    return [torch.stack(layer).mean(0).numpy() if layer else None for layer in by_layer]


def _plain(numbers: dict[str, Numbers], between: MapDistance | None) -> JsonDict:
    """Return `entropy` and `distance` by layer and head of each model, `js` and `cka` by layer.

    A layer without attention has null.
    """
    models: JsonDict = {
        name: {"entropy": _lists(each.entropy), "distance": _lists(each.distance)}
        for name, each in numbers.items()
    }
    return models if between is None else models | asdict(between)


def _lists(layers: Sequence[Array | None]) -> list[list[float] | None]:
    return [None if heads is None else heads.tolist() for heads in layers]


def _beside(source: str, student: Pretrained) -> Pretrained:
    """Load the teacher at the student's image size."""
    channels, height, width = student.preprocessing.input_size
    teacher = load_pretrained(source, img_size=(height, width))
    check_comparable(teacher.model, student.model)
    theirs = teacher.preprocessing.input_size[0]
    if theirs != channels:
        raise TransferError(f"the teacher takes {theirs} channels and the student {channels}")
    return teacher


def _view(image: Shown, loaded: dict[str, Pretrained]) -> View:
    """Look at an image with each model, preprocessed for each."""
    looks = {
        name: look(each.model, to_tensor(image.original, each.preprocessing)) for name, each in loaded.items()
    }
    return View(image, looks)


def _draw(view: View, query: Query, layers: Sequence[int], out: Path) -> None:
    """Write the picture of one query: the student's layers and heads; and the teacher beside it."""
    own, name = view.looks["student"], view.shown.name
    title = f"{name}: what {query.title(own.layouts)} attends to"
    grid = draw_grid(view.shown.pixels, own, query, layers, title)
    write_bytes(out / f"{name}_{query.word}.png", to_png(grid, ground="white"))
    theirs = view.looks.get("teacher")
    if theirs is None or all(query.token(layout) is None for layout in theirs.layouts):
        return
    beside = draw_beside(view.shown.pixels, [theirs, own], query, layers, title)
    write_bytes(out / f"{name}_{query.word}_teacher.png", to_png(beside, ground="white"))


def _title(source: str, teacher: str | None) -> str:
    return f"Attention of {source}" + (f" beside {teacher}" if teacher else "")
