"""The page: images, maps and code in one HTML file that asks nothing of the network."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from ....checkpoints.preprocessing import Preprocessing
from ....models.copying.teacher_view import Normalization, Renormalized
from ....models.errors import ConfigError, DataError, JsonDict
from ....models.families import sites
from ...data.augment import eval_transform
from ...data.digits import VALIDATION_SIZE, DigitsSource
from ...data.image_folder import open_image
from ..layer_maps import KeyPlaces, MergePlaces, key_count, trace
from ..report.ink import (
    BLUE,
    FAINT,
    GREEN,
    HEAT,
    INK,
    ORANGE,
    SIGNED,
    Array,
    Theme,
    draw_picture,
    new_figure,
    new_plots,
    write_corner,
)
from ..report.rendering import Figure, data_url, render_page
from .map_figures import LayerLook, Look, Numbers, Query, layer_name, token_name

# Charts by layer: entropy and distance of every head, and how far a student is from its teacher.

STUDENT, TEACHER, BETWEEN = ORANGE, BLUE, GREEN
APART = 0.01
"""The part of the axis by which the dots of each of two models are beside their layer."""


@dataclass(frozen=True)
class MapDistance:
    """By layer: Jensen-Shannon divergence of the maps in nats, debiased linear CKA of the patch tokens.

    The divergence is None where a block has no attention.
    """

    js: Sequence[float | None]
    cka: Sequence[float | None]
    cka_random: Sequence[float | None]
    """Of a model of the teacher's architecture with random weights."""


def draw_layers(models: dict[str, Numbers], between: MapDistance | None, theme: Theme) -> Drawing:
    """Draw entropy and mean distance, a dot a head and a line their mean; with a teacher, JS and CKA too."""
    rows = 1 if between is None else 2
    figure, grid = new_plots(theme, (9.6, 3.0 * rows), rows, 2, grid="y")
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    entropy, distance = grid[:2]
    for name, numbers in models.items():
        right = 0 if len(models) == 1 else -APART if name == "teacher" else APART
        _heads(entropy, numbers.entropy, name, right)
        _heads(distance, numbers.distance, name, right)
    _axes(entropy, "entropy of a row, nats", theme)
    _axes(distance, "mean distance, patches", theme)
    _ceiling(entropy, list(models.values()), theme)
    if between is not None:
        _line(grid[2], between.js)
        _line(grid[3], between.cka)
        random = _line(grid[3], between.cka_random)
        random.set(color=INK[theme], linestyle=(0, (4, 4)), linewidth=1, marker="")
        random.set_label("random weights")
        _axes(grid[2], "JS divergence from the teacher, nats", theme)
        _axes(grid[3], "linear CKA (debiased) with the teacher", theme)
        least = min((value for value in (*between.cka, *between.cka_random) if value is not None), default=0)
        grid[3].set_ylim(min(least * 1.1, 0), 1.04)
        if all(value is None for value in between.cka):
            words = "left out: other patch grids, or too few patches"
            grid[3].text(0.5, 0.5, words, ha="center", color=INK[theme], transform=grid[3].transAxes)
        else:
            grid[3].legend(frameon=False, fontsize=8, labelcolor=INK[theme], loc="lower left")
    for axes in grid:
        axes.set_xlim(-0.5, len(models["student"].stages) - 0.5)
        _stages(axes, models["student"].stages, theme)
    if len(models) > 1:
        entropy.legend(frameon=False, fontsize=8, labelcolor=INK[theme], loc="lower right")
    return figure


def _heads(axes: Any, values: Sequence[Array | None], name: str, right: float) -> None:
    """Draw the heads of a model to the `right` of the layers' ticks, in parts of the axis."""
    color = TEACHER if name == "teacher" else STUDENT
    places = np.arange(len(values)) + right * len(values)
    dots = [
        (place, head)
        for place, heads in zip(places, values, strict=True)
        if heads is not None
        for head in heads
    ]
    if not dots:
        return
    axes.plot(*zip(*dots, strict=True), "o", color=color, markersize=4, alpha=0.45, markeredgewidth=0)
    means = [np.nan if heads is None else heads.mean() for heads in values]
    axes.plot(places, means, color=color, linewidth=2, label=name)


def _line(axes: Any, values: Sequence[float | None]) -> Any:
    shown = [np.nan if value is None else value for value in values]
    return axes.plot(np.arange(len(shown)), shown, color=BETWEEN, linewidth=2, marker="o", markersize=5)[0]


def _stages(axes: Any, stages: Sequence[int], theme: Theme) -> None:
    """Draw a line between stages, and their numbers."""
    starts = [layer for layer, stage in enumerate(stages) if layer == 0 or stage != stages[layer - 1]]
    for start in starts if len(starts) > 1 else []:
        if start:
            axes.axvline(start - 0.5, color=FAINT[theme], linewidth=0.8)
        axes.annotate(
            f"stage {stages[start] + 1}", (start - 0.1, 0.02), xycoords=("data", "axes fraction"), fontsize=7,
            color=INK[theme],
        )  # fmt: skip


def _ceiling(axes: Any, models: Sequence[Numbers], theme: Theme) -> None:
    """Draw the entropy of even attention, the maximum, over as many keys as a layer has."""
    keys = [max(layer) for layer in zip(*(numbers.keys for numbers in models), strict=True)]
    tops = [math.log(count) if count else np.nan for count in keys]
    lines = np.arange(len(keys))
    ends, least = np.array([lines - 0.5, lines + 0.5]), next(top for top in tops if top == top)
    axes.plot(ends, [tops, tops], color=INK[theme], linewidth=0.8, linestyle=(0, (4, 4)))
    named = f"even over {max(keys)} tokens" if len({*keys} - {0}) == 1 else "even over all keys of the layer"
    axes.annotate(
        named, (0.01, least), xycoords=("axes fraction", "data"), va="bottom", color=INK[theme], fontsize=8
    )
    axes.set_ylim(0, np.nanmax(tops) * 1.12)


def _axes(axes: Any, title: str, theme: Theme) -> None:
    axes.set_title(title, color=INK[theme], fontsize=10, loc="left")
    axes.set_xlabel("layer", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.04)  # a dot at the top is shown whole


# Pictures of deformable merges: the places of the image that merged tokens are made of.

PLACE = "#ff3b30"
INCHES = 2.4
"""The longer side of a panel."""
ROWS = ("all tokens", "one token", "one token,\nto stage 1")


def draw_merges(picture: Array, merges: Sequence[MergePlaces], query: Query, title: str) -> Drawing:
    """Draw a column a merge: the places of all tokens, of the token under the query, and of its tokens' tokens.

    A frame is the area that an ordinary merge would read. The number is the mean shift of a place, in pixels.
    """
    sides = picture.shape[:2]
    height, width = (INCHES * side / max(sides) for side in sides)
    rows = ROWS if query.place is not None else ROWS[:1]
    figure = new_figure(width * len(merges) + 0.7, height * len(rows) + 0.9)
    grid = figure.subplots(len(rows), len(merges), squeeze=False)
    for number, (column, merge) in enumerate(zip(grid.T, merges, strict=True)):
        column[0].set_title(merge_name(merge), color=INK["light"], fontsize=8)
        token = None if query.place is None else merge.token_at(query.place)
        _draw_all(column[0], picture, merge)
        if len(rows) > 1:
            own = None if token is None else merge.in_image()[token]
            _draw_token(column[1], picture, merge, token, own)
            traced = None if token is None else trace(merges[: number + 1], token)
            _draw_token(column[2], picture, merge, token, traced)
    for axes, name in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(name, color=INK["light"], fontsize=8)
    figure.suptitle(title, color=INK["light"], fontsize=10)
    return figure


def merge_name(merge: MergePlaces) -> str:
    """Return the name of a merge, with its tokens before and after."""
    before, after = ("{}x{}".format(*each) for each in (merge.grid, merge.merged))
    return f"stage {merge.stage + 1} to {merge.stage + 2}: {before} to {after}"


def _draw_all(axes: Any, picture: Array, merge: MergePlaces) -> None:
    draw_picture(axes, picture, merge.merged, None)
    spacing = INCHES * 72 / max(merge.grid)
    _draw_places(axes, picture, merge.in_image().flatten(0, 2), min(3.0, 0.4 * spacing))
    write_corner(axes, f"{merge.shift().mean():.2g} px")


def _draw_token(
    axes: Any, picture: Array, merge: MergePlaces, token: tuple[int, int] | None, places: Tensor | None
) -> None:
    """Draw the places of a token, and the frame of an ordinary merge; nothing where there is no token."""
    tall, wide = merge.token
    draw_picture(axes, picture, (1 / (2 * tall), 1 / (2 * wide)), token)
    if places is not None:
        _draw_places(axes, picture, places, 3.0)


def _draw_places(axes: Any, picture: Array, places_P2: Tensor, size: float) -> None:
    down, right = (places_P2 * torch.tensor(picture.shape[:2])).T.numpy()
    axes.plot(right, down, "s", color=PLACE, markersize=size, markeredgewidth=0)


# The images to look at: which files, and what of each the model sees.

MAX_IMAGES = 16
"""More make a page that no browser likes, and that nobody reads."""
DIGIT = re.compile(r"digits:(\d+)")
Given: TypeAlias = str | PathLike[str] | Image.Image
"""A file, a folder of files, `digits:N`, or a picture of PIL."""
Source: TypeAlias = Path | int | Image.Image | Tensor
"""Where an image is, or itself."""


@dataclass(frozen=True)
class Shown:
    """An image as the model sees it: `pixels` (H, W, 3) in bytes, after resizing and cropping."""

    name: str
    original: Image.Image | Tensor
    """The photograph, or a tensor (1, C, H, W) that is normalized for the model."""
    pixels: NDArray[np.uint8]

    def tensor(self, spec: Preprocessing, own: Preprocessing) -> Tensor:
        """Return the image as a model of `spec` wants it; `own` is of the model that a tensor is normalized for."""
        if not isinstance(self.original, Tensor):
            return to_tensor(self.original, spec)
        if spec == own:
            return self.original
        theirs, ours = (Normalization(each.mean, each.std) for each in (spec, own))
        change = Renormalized(spec.input_size[0], theirs, ours, spec.input_size[1:])
        return change(self.original.cpu())


def read_images(images: Tensor | Given | Sequence[Given], spec: Preprocessing) -> list[Shown]:
    """Read images: files, folders of images, `digits:N`, test image N of the digits data, pictures of PIL, or a batch.

    Raises DataError: there is no such file, it is no image, or there are more than `MAX_IMAGES`.
    """
    if isinstance(images, Tensor):
        found: list[tuple[str, Source]] = [
            (f"image_{place}", each[None]) for place, each in enumerate(images)
        ]
    else:
        several = [images] if isinstance(images, str | PathLike | Image.Image) else images
        found = [each for one in several for each in _find(one)]
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
        tensor = original if isinstance(original, Tensor) else to_tensor(original, spec)
        shown.append(Shown(name, original, to_pixels(tensor, spec)))
    return shown


def to_tensor(image: Image.Image, spec: Preprocessing) -> Tensor:
    """Return the image as the model of `spec` wants it, (1, C, H, W), by the transform of evaluation."""
    made: Tensor = eval_transform(spec)(image.convert("L" if spec.input_size[0] == 1 else "RGB"))
    return made[None]


def _find(word: Given) -> list[tuple[str, Source]]:
    """Return name and place of each image that a word means; a digit's place is its number."""
    if isinstance(word, Image.Image):
        return [(Path(str(getattr(word, "filename", "") or "image")).stem, word)]
    digit = DIGIT.fullmatch(str(word))
    if digit is not None:
        return [(f"digit_{digit[1]}", int(digit[1]))]
    path = Path(word).expanduser()
    if path.is_dir():
        known = Image.registered_extensions()
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in known)
        if not files:
            raise DataError(f"{str(word)!r} has no image in it; name a folder of image files")
        return [(file.stem, file) for file in files]
    if not path.is_file():
        raise DataError(f"{str(word)!r} is no image file and no folder; valid are both, and digits:0")
    return [(path.stem, path)]


def _read(source: Source) -> Image.Image | Tensor:
    if isinstance(source, Tensor | Image.Image):
        return source
    if isinstance(source, int):
        if source >= VALIDATION_SIZE:
            raise DataError(f"digits:{source} does not exist; the test images are 0 to {VALIDATION_SIZE - 1}")
        image, _ = DigitsSource("validation", "RGB").read(source)
        return image
    try:
        with open_image(source) as image:
            return image.convert("RGB")
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
    picture = (image_1CHW[0].float().cpu() * std + mean).clamp(0, 1).expand(3, -1, -1)
    return (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


MAX_MEGABYTES = 64
"""Of maps in a page, before base64 makes a third more of them."""
TOP = 127
SCALE, KEY = 4, 4
"""Bytes of the scale of a row, and of the place of a key in a window."""


@dataclass(frozen=True)
class View:
    """One image as each model sees it, and what it did with it (by name: `student`, `teacher`)."""

    name: str
    pixels: Mapping[str, Array]
    looks: Mapping[str, Look]
    """The teacher's layers are in the order of the student's."""


def check_page_size(
    models: Sequence[tuple[nn.Module, Sequence[int]]], images: int, *, rollouts: bool = True
) -> None:
    """Raise ConfigError where the maps of these layers of `models` would make a page that is too large."""
    image_bytes = sum(_bytes(model, layer, rollouts) for model, shown in models for layer in shown)
    megabytes, layers = images * image_bytes / 1e6, models[0][1]
    if megabytes > MAX_MEGABYTES:
        raise ConfigError(
            f"the page would hold {megabytes:.0f} MB of maps of {images} images and {len(layers)} layers, and at most "
            f"{MAX_MEGABYTES} are taken; give fewer images, fewer layers by --layers, or smaller images by --img_size"
        )


def _bytes(model: nn.Module, layer: int, rollouts: bool) -> int:
    """Return the bytes of a layer's maps, and of its rollout, on one image."""
    site = sites(model)[layer]
    tokens, keys = site.shape.geometry.num_tokens, key_count(model, site)
    windows = KEY * keys if keys < tokens else 0
    rolled = tokens + SCALE if rollouts else 0
    return tokens * (site.num_heads * (keys + SCALE) + windows + rolled)


@dataclass(frozen=True)
class Titles:
    """The words of a page: its title, the names of its models and layers, and what is to be said of them."""

    title: str
    models: Mapping[str, str]
    layers: Sequence[str]
    notes: Sequence[str] = ()


def map_page(images: Sequence[JsonDict], titles: Titles, query: Query, chart: Figure) -> str:
    """Return the page; `images` are those of `embed`, `chart` the numbers by layer."""
    data = {
        "layers": list(titles.layers),
        "names": dict(titles.models),
        "query": query.word if query.place is None else list(query.place),
        "heat": _colors(HEAT),
        "signed": _colors(SIGNED),
        "images": list(images),
    }
    words = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return render_page(
        "visualize/map_page.html", title=titles.title, notes=titles.notes, chart=chart, data=words
    )


def layer_names(looks: Mapping[str, Look], layers: Sequence[int]) -> list[str]:
    """Return the names of the chosen layers."""
    return [layer_name(looks["student"], layer, looks.get("teacher")) for layer in layers]


def embed(view: View, layers: Sequence[int]) -> JsonDict:
    """Return what the page needs of an image: the pictures, and each model's maps of the chosen layers."""
    models = {
        name: [
            _layer(look.layers[layer], name == "teacher" and look.layers[layer].number is None)
            for layer in layers
        ]
        for name, look in view.looks.items()
    }
    return {
        "name": view.name,
        "seen": {name: _picture(pixels) for name, pixels in view.pixels.items()},
        "models": models,
        "merges": {name: [_merge(merge) for merge in look.merges] for name, look in view.looks.items()},
    }


def _picture(pixels: Array) -> JsonDict:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return {"url": data_url(file.getvalue()), "size": list(pixels.shape[:2])}


def _merge(merge: MergePlaces) -> JsonDict:
    """Return the places that a merge reads, down and right in parts of the image, as bytes."""
    return {
        "name": merge_name(merge),
        "grid": merge.merged,
        "token": merge.token,
        "places": _text(merge.in_image().numpy().astype("<f4").tobytes()),
        "shift": float(merge.shift().mean()),
    }


def _layer(layer: LayerLook, alone: bool) -> JsonDict:
    """Return the maps of a layer, head by head, and its rollout, as bytes with a scale a row.

    `alone` marks a stand-in: the model has no partner for the layer beside it, and the page shows that one alone.
    """
    maps = [] if layer.maps is None else [_quantized(head) for head in layer.maps]
    layout = layer.layout
    names = [token_name(token, layout) for token in range(layout.num_prefix)]
    return {
        "grid": layout.grid,
        "prefix": names,
        "words": layout.prefix,
        "signed": layer.signed,
        "heads": maps,
        "groups": layer.groups,
        "alone": alone,
        "rollout": None if layer.rolled is None else _quantized(layer.rolled),
        "keys": _keys(layer.places),
    }


def _keys(places: KeyPlaces) -> JsonDict:
    """Return the grid of the keys, the parts of the image that they cover, and the tokens of each query's window."""
    known: JsonDict = {"grid": places.grid, "extent": places.extent}
    if places.windows is not None:
        known["windows"] = _text(places.window_tokens().numpy().astype("<i4").tobytes())
    return known


def _quantized(rows: Tensor) -> JsonDict:
    parts, scale = quantize(rows.numpy())
    return {
        "keys": parts.shape[1],
        "weights": _text(parts.tobytes()),
        "scales": _text(scale.astype("<f4").tobytes()),
    }


def quantize(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return rows (N, M) as whole numbers up to ±127, in parts of the largest weight of each row, and that weight.

    A weight is wrong by at most 1/254 of the largest of its row.
    """
    scale = np.abs(rows).max(-1)
    divisor = np.where(scale > 0, scale, 1)[:, None]
    return np.rint(rows / divisor * TOP).astype(np.int8), scale


def _colors(name: str) -> str:
    """Return 256 colors, three bytes each."""
    table = mpl.colormaps[name](np.linspace(0, 1, 256))[:, :3]
    return _text(np.rint(table * 255).astype(np.uint8).tobytes())


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
