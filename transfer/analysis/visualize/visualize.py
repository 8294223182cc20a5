"""From models and images to a folder: pictures, numbers and a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....checkpoints.atomic import write_bytes, write_text
from ....checkpoints.files import read_if_there
from ....checkpoints.pretrained import build_untrained, load_pretrained
from ....checkpoints.provenance import Pretrained
from ....models.errors import CheckpointError, ConfigError, JsonDict, TransferError, check_types
from ....models.families import (
    TokenLayout,
    blocks_of,
    check_supported,
    depths,
    evaluating,
    layout_of,
    plan_depth,
    sites,
)
from ....models.plan_syntax import layer_numbers
from ..layer_maps import KeyPlaces, collect_merges, key_count, layer_maps, map_divergence
from ..report.ink import Array, to_png
from ..report.rendering import Figure, write_png
from ..report.tables import to_json
from . import map_figures as measures
from .map_figures import (
    LayerLook,
    Look,
    Numbers,
    Query,
    default_query,
    draw_beside,
    draw_grid,
    mean_numbers,
    read_query,
)
from .map_page import (
    MapDistance,
    Shown,
    View,
    check_page_size,
    draw_layers,
    draw_merges,
    embed,
    layer_names,
    map_page,
    read_images,
    to_tensor,
)

# What one model does with one image: the maps of its layers, the tokens after each block, and their numbers.

MAX_MAP_BYTES = 4 * 2**30


@torch.no_grad()
def look(model: nn.Module, image: Tensor) -> Look:
    """Run `model` on one image (1, C, H, W).

    A layer that is not linear in V gives the rows of its Jacobian, at a backward pass a token and channel.

    Raises:
        TransferError: the maps of the model would not fit in 4 GB.
        UnsupportedModelError: a model of another kind.
    """
    check_supported(model, copied=True)
    count_weights(model, range(len(sites(model))), 4, "maps", "a smaller --img_size")
    with evaluating(model), _tokens(model) as tokens, collect_merges(model, image) as merges:
        model(image)
    found, places = layer_maps(model, image, range(len(tokens))), sites(model)
    layers: list[LayerLook] = []
    rolled = torch.eye(0)
    for site, layout in zip(places, token_layouts(model), strict=True):
        seen = found.get(site.index)
        maps = None if seen is None else seen.weights[0].cpu()
        keys = KeyPlaces(layout.geometry) if seen is None else seen.places
        rolled = rolled if site.place else torch.eye(layout.num_tokens)
        if maps is not None:
            rolled = measures.roll(rolled, keys.on_tokens(measures.shares(maps).mean(0)))
        layers.append(LayerLook(site.stage, layout, maps, keys, rolled, tokens[site.index]))
    return Look(layers, merges)


def count_weights(model: nn.Module, layers: Sequence[int], size: int, of: str, remedy: str) -> int:
    """Return the number of weights in the maps of these layers on one image, each of `size` bytes.

    Raises TransferError: they would not fit in 4 GB; `of` and `remedy` end its sentence.
    """
    places = [sites(model)[layer] for layer in layers]
    numbers = [site.num_heads * site.shape.geometry.num_tokens * key_count(model, site) for site in places]
    if size * sum(numbers) > MAX_MAP_BYTES:
        most = max(range(len(numbers)), key=numbers.__getitem__)
        shape = places[most].shape
        raise TransferError(
            f"the {of} of {len(layers)} layers take {size * sum(numbers) / 2**30:.1f} GB (layer {layers[most]}: "
            f"{shape.num_heads} heads, {shape.geometry.num_tokens} tokens), and at most {MAX_MAP_BYTES / 2**30:.0f} "
            f"are taken; give {remedy}"
        )
    return sum(numbers)


def token_layouts(model: nn.Module) -> list[TokenLayout]:
    """Return the tokens of each layer.

    Raises UnsupportedModelError: the model has no image size.
    """
    return [layout_of(model, site) for site in sites(model)]


def check_comparable(teacher: nn.Module, student: nn.Module) -> None:
    """Raise TransferError where two models cannot be put side by side layer by layer, patch by patch."""
    blocks = [depths(model) for model in (teacher, student)]
    if blocks[0] != blocks[1]:
        theirs, ours = (" + ".join(map(str, each)) for each in blocks)
        raise TransferError(f"the teacher has {theirs} blocks and the student {ours}: no layers go together")
    for stage, (t, s) in enumerate(zip(token_layouts(teacher), token_layouts(student), strict=True)):
        if t.grid != s.grid:
            theirs, ours = (f"{height}x{width}" for height, width in (t.grid, s.grid))
            where = f" in layer {stage}" if len(blocks[0]) > 1 else ""
            raise TransferError(
                f"the teacher has {theirs} patches and the student {ours}{where}: give an --img_size of both"
            )


def divergence(teacher: Look, student: Look) -> list[float | None]:
    """Return the Jensen-Shannon divergence of the shares by layer, in nats; unequal heads are matched.

    Where prefix tokens differ, of what patches take from patches. None where a block has no attention.
    """
    return [_divergence(t, s) for t, s in zip(teacher.layers, student.layers, strict=True)]


def _divergence(teacher: LayerLook, student: LayerLook) -> float | None:
    alike = teacher.layout == student.layout
    theirs, ours = (
        each.shares_of_tokens(0 if alike else each.layout.num_prefix) for each in (teacher, student)
    )
    if theirs is None or ours is None:
        return None
    return map_divergence(theirs[None], ours[None], match_heads=teacher.heads != student.heads)


def cka(teacher: Sequence[Sequence[Tensor]], student: Sequence[Sequence[Tensor]]) -> list[float | None]:
    """Return the linear CKA of the patch tokens (P, C) of each image and layer; a sample is a patch."""
    by_layer = zip(zip(*teacher, strict=True), zip(*student, strict=True), strict=True)
    return [measures.linear_cka(torch.cat(theirs), torch.cat(ours)) for theirs, ours in by_layer]


@contextmanager
def _tokens(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the tokens (N, C) that leave each block while the model runs."""
    tokens: list[Tensor] = []

    def keep(block: nn.Module, inputs: object, out: Tensor) -> None:
        tokens.append(out[0].flatten(0, -2).float().cpu())

    hooks = [block.register_forward_hook(keep) for block in blocks_of(model)]
    try:
        yield tokens
    finally:
        for hook in hooks:
            hook.remove()


RANDOM = "random"
"""A model of the teacher's architecture that learned nothing."""
CHART = "Entropy and mean distance of attention by layer, and distance from the teacher where there is one"


@check_types()
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
        out: the folder, which is made.
        teacher: a source to put beside it, at the same image size.
        queries: numbers of patches, row by row from 0, names of prefix tokens, and places `ROWxCOLUMN` in pixels;
            the class token by default, the patch in the middle without one. Patches of a pyramid have no numbers.
        layers: which to show, as in a plan (`0,5,9-11`, `-1`); all by default. Numbers are of all layers.
        how: `model`, `img_size` and the rest, as of `load_pretrained`, for `source`.

    Raises:
        GraftError: a source or image that cannot be read, a layer or query that is not there, models that do not go
            together, or more maps than a page holds.
    """
    loaded = load_models(source, teacher, how)
    chosen = chosen_layers(loaded["student"].model, layers)
    asked = read_queries(queries, loaded["student"])
    shown = read_images(images, loaded["student"].preprocessing)
    check_page_size([each.model for each in loaded.values()], len(shown), chosen)
    if teacher is not None:
        loaded[RANDOM] = replace(loaded["teacher"], model=build_untrained(loaded["teacher"]))
    seen = Seen()
    embedded, pictures = [], list[str]()
    for image in shown:
        looks = _looks(image, loaded)
        seen.add(looks)
        looks.pop(RANDOM, None)
        view = View(image, looks)
        embedded.append(embed(view, chosen))
        for query in asked:
            title = f"{image.name}: what {query.title(looks['student'].layouts)} attends to"
            pictures += draw_query(view, query, chosen, out, title)
    names = layer_names(view.looks["student"], chosen)
    numbers, comparison = seen.numbers(), seen.comparison()
    page = partial(map_page, embedded, names, asked[0], title=page_title(source, teacher))
    return write_page(page, numbers, comparison, out, pictures)


def write_page(
    page: Callable[[Figure], str],
    numbers: dict[str, Numbers],
    comparison: MapDistance | None,
    out: Path,
    pictures: Sequence[str],
) -> Path:
    """Write the chart of the numbers, the numbers and the page with the chart; return the path of the page.

    The `pictures` are named in numbers.json, and those of an earlier page in `out` that are not among them are removed.
    """
    older = _name_pictures(out / "numbers.json")
    chart = Figure("layers", "By layer", "", CHART, partial(draw_layers, numbers, comparison))
    write_png(chart, out / "layers.png")
    write_text(out / "numbers.json", to_json({**_plain(numbers, comparison), "pictures": list(pictures)}))
    write_text(out / "index.html", page(chart))
    for name in older.difference(pictures):
        (out / name).unlink(missing_ok=True)
    return out / "index.html"


def _name_pictures(path: Path) -> set[str]:
    """Return the pictures that an earlier page wrote beside its numbers; none without such a file."""
    try:
        names = json.loads(read_if_there(path) or "{}")["pictures"]
        return {name for name in names if Path(name).name == name and name.endswith(".png")}
    except (CheckpointError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return set()


def chosen_layers(student: nn.Module, words: str) -> list[int]:
    """Return the layers to show. Raises ConfigError: one does not exist, or none of them has attention."""
    chosen = layer_numbers(words, plan_depth(student), "--layers")
    places = sites(student)
    if not any(places[layer].num_heads for layer in chosen):
        raise ConfigError(f"--layers {words}: no layer of these has attention, so there is nothing to show")
    return chosen


def read_queries(words: Sequence[str], student: Pretrained) -> list[Query]:
    _, height, width = student.preprocessing.input_size
    layouts = token_layouts(student.model)
    if not words:
        return [default_query(layouts, (height, width))]
    return [read_query(word, layouts, (height, width)) for word in words]


class Seen:
    """Numbers of every image seen so far, by model; maps are dropped, because they are large."""

    def __init__(self) -> None:
        self._numbers: dict[str, list[Numbers]] = {}
        self._patches: dict[str, list[list[Tensor]]] = {}
        self._js: list[list[float | None]] = []

    def add(self, looks: dict[str, Look]) -> None:
        """Take the numbers of one image; of random weights the patches alone."""
        for name, each in looks.items():
            self._patches.setdefault(name, []).append([layer.patches for layer in each.layers])
            if name != RANDOM:
                self._numbers.setdefault(name, []).append(each.numbers())
        if "teacher" in looks:
            self._js.append(divergence(looks["teacher"], looks["student"]))

    def numbers(self) -> dict[str, Numbers]:
        """Return means over images, teacher last."""
        return {name: mean_numbers(found) for name, found in self._numbers.items()}

    def comparison(self) -> MapDistance | None:
        """Return the distance from the teacher; None without one."""
        if not self._js:
            return None
        layers = ([each for each in layer if each is not None] for layer in zip(*self._js, strict=True))
        js = [sum(layer) / len(layer) if layer else None for layer in layers]
        theirs, ours, random = (self._patches[name] for name in ("teacher", "student", RANDOM))
        return MapDistance(js, cka(theirs, ours), cka(theirs, random))


def _plain(numbers: dict[str, Numbers], between: MapDistance | None) -> JsonDict:
    """Return `entropy` and `distance` by layer and head of each model, and by layer `js`, `cka` and `cka_random`.

    A layer without attention has null. A deformable merge has the mean `shift` of its places in pixels, and the share
    of places `outside` of the image.
    """
    models: JsonDict = {name: _plain_model(each) for name, each in numbers.items()}
    return models if between is None else models | asdict(between)


def _plain_model(numbers: Numbers) -> JsonDict:
    known: JsonDict = {"entropy": _lists(numbers.entropy), "distance": _lists(numbers.distance)}
    merges = [{"shift": float(shift), "outside": float(outside)} for shift, outside in numbers.merges]
    return known | ({"merges": merges} if merges else {})


def _lists(layers: Sequence[Array | None]) -> list[list[float] | None]:
    return [None if heads is None else heads.tolist() for heads in layers]


def load_models(source: str, teacher: str | None, how: JsonDict) -> dict[str, Pretrained]:
    """Load the student and, where there is one, the teacher at the student's image size."""
    loaded = {"student": load_pretrained(source, **how)}
    student = loaded["student"].model
    check_supported(student, copied=True)
    if teacher is None:
        return loaded
    channels, height, width = loaded["student"].preprocessing.input_size
    loaded["teacher"] = load_pretrained(teacher, img_size=(height, width))
    check_comparable(loaded["teacher"].model, student)
    theirs = loaded["teacher"].preprocessing.input_size[0]
    if theirs != channels:
        raise TransferError(f"the teacher takes {theirs} channels and the student {channels}")
    return loaded


def _looks(image: Shown, loaded: dict[str, Pretrained]) -> dict[str, Look]:
    """Look at an image with each model, preprocessed for each."""
    return {
        name: look(each.model, to_tensor(image.original, each.preprocessing)) for name, each in loaded.items()
    }


def draw_query(view: View, query: Query, layers: Sequence[int], out: Path, title: str) -> list[str]:
    """Write the pictures of one query: the student's layers and heads, its merges, and the teacher beside it.

    Returns the names of the files.
    """
    own, name, pixels = view.looks["student"], f"{view.shown.name}_{query.word}", view.shown.pixels
    drawn = {f"{name}.png": draw_grid(pixels, own, query, layers, title)}
    if own.merges:
        words = f"{view.shown.name}: what deformable merges read"
        drawn[f"{name}_merges.png"] = draw_merges(pixels, own.merges, query, words)
    theirs = view.looks.get("teacher")
    if theirs is not None and any(query.token(layout) is not None for layout in theirs.layouts):
        drawn[f"{name}_teacher.png"] = draw_beside(pixels, [theirs, own], query, layers, title)
    for file, figure in drawn.items():
        write_bytes(out / file, to_png(figure, ground="white"))
    return list(drawn)


def page_title(source: str, teacher: str | None) -> str:
    return f"Attention of {source}" + (f" beside {teacher}" if teacher else "")
