"""From models and images to a folder: pictures, numbers and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ....checkpoints.atomic import write_bytes, write_text
from ....checkpoints.pretrained import Pretrained, load_pretrained
from ....models.errors import TransferError
from ....models.families import attention_blocks, check_supported, token_layout
from ....models.json_types import JsonDict
from ....models.layer_plan import layer_numbers
from ..report.ink import to_png
from ..report.pages import Plot
from ..report.tables import to_json
from .layer_figures import MapDistance, Numbers, draw_layers
from .look import (
    Look,
    Summary,
    check_comparable,
    cka,
    default_query,
    divergence,
    look,
    query_token,
    token_word,
)
from .map_figures import draw_beside, draw_grid, grid_title
from .map_page import View, check_page_size, embed, map_page
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
        queries: numbers of patches, row by row from 0, and names of prefix tokens; the class token by default,
            the patch in the middle without one.
        layers: which to show, as in a plan (`0,5,9-11`, `-1`); all by default. Numbers are of all layers.
        how: `model`, `img_size` and the rest, as of `load_pretrained`, for `source`.

    Raises GraftError: a source or image that cannot be read, a layer or query that is not there, models that do
    not go together, or more maps than a page holds.
    """
    loaded = {"student": load_pretrained(source, **how)}
    student = loaded["student"].model
    check_supported(student, copied=True)
    if teacher is not None:
        loaded["teacher"] = _beside(teacher, loaded["student"])
    layout = token_layout(student)
    chosen = layer_numbers(layers, len(attention_blocks(student)), "--layers")
    asked = [query_token(word, layout) for word in queries or [default_query(layout)]]
    shown = read_images(images, loaded["student"].preprocessing)
    check_page_size([each.model for each in loaded.values()], len(shown), len(chosen))
    seen = Seen()
    embedded = []
    for image in shown:
        view = _view(image, loaded)
        seen.add(view.looks)
        embedded.append(embed(view, chosen))
        for token in asked:
            _draw(view, token, chosen, out)
    numbers, comparison = seen.numbers(), seen.comparison()
    chart = Plot("layers", "By layer", "", CHART, partial(draw_layers, numbers, comparison))
    write_bytes(out / "layers.png", to_png(chart.draw("light"), ground="white"))
    write_text(out / "numbers.json", to_json(_plain(numbers, comparison)))
    write_text(out / "index.html", map_page(embedded, chosen, asked[0], chart, _title(source, teacher)))
    return out / "index.html"


class Seen:
    """Numbers of every image seen so far, by model; maps are dropped, because they are large."""

    def __init__(self) -> None:
        self.looks: dict[str, list[Summary]] = {}
        self.js: list[list[float]] = []

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
                torch.stack([each.entropy for each in found]).mean(0).numpy(),
                torch.stack([each.distance for each in found]).mean(0).numpy(),
                found[0].num_tokens,
            )
            for name, found in self.looks.items()
        }

    def comparison(self) -> MapDistance | None:
        """Return the distance from the teacher; None without one."""
        if not self.js:
            return None
        patches = ([each.patches for each in self.looks[name]] for name in ("teacher", "student"))
        return MapDistance(torch.tensor(self.js).mean(0).tolist(), cka(*patches))


def _plain(numbers: dict[str, Numbers], between: MapDistance | None) -> JsonDict:
    """Return `entropy` and `distance` by layer and head of each model, `js` and `cka` by layer."""
    models: JsonDict = {
        name: {"entropy": each.entropy.tolist(), "distance": each.distance.tolist()}
        for name, each in numbers.items()
    }
    return models if between is None else models | asdict(between)


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
    return View(image, looks, {name: each.rollout() for name, each in looks.items()})


def _draw(view: View, token: int, layers: Sequence[int], out: Path) -> None:
    """Write the picture of one query: the student's layers and heads; and the teacher beside it."""
    own, name = view.looks["student"], view.shown.name
    word = token_word(token, own.layout)
    title = grid_title(name, token, own)
    grid = draw_grid(view.shown.pixels, own, view.rolled["student"].numpy(), token, layers, title)
    write_bytes(out / f"{name}_{word}.png", to_png(grid, ground="white"))
    theirs = view.looks.get("teacher")
    if theirs is None or (token < own.layout.num_prefix and word not in theirs.layout.prefix):
        return
    tokens = [query_token(word, each.layout) for each in (theirs, own)]
    rolled = [view.rolled[model].numpy() for model in ("teacher", "student")]
    beside = draw_beside(view.shown.pixels, [theirs, own], rolled, tokens, layers, title)
    write_bytes(out / f"{name}_{word}_teacher.png", to_png(beside, ground="white"))


def _title(source: str, teacher: str | None) -> str:
    return f"Attention of {source}" + (f" beside {teacher}" if teacher else "")
