"""From models and images to a folder: pictures, numbers and a page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure as Drawing
from torch import Tensor, nn
from typing_extensions import Unpack

from ....checkpoints.atomic import write_bytes, write_text
from ....checkpoints.dense_models import dense_of
from ....checkpoints.files import read_if_there
from ....checkpoints.preprocessing import Preprocessing
from ....checkpoints.pretrained import MADE_HERE, LoadSettings, build_untrained, describe, describe_model
from ....checkpoints.provenance import Pretrained
from ....models.dense.dense_model import DenseModel
from ....models.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    GraftError,
    JsonDict,
    TransferError,
    check_types,
)
from ....models.families import (
    TokenLayout,
    blocks_of,
    check_supported,
    evaluating,
    layout_of,
    plan_depth,
    sites,
)
from ....models.given import Model, check_images
from ....models.plan_syntax import layer_numbers
from ...data.loading import followed
from ...methods.dual import DualViT
from ..layer_maps import KeyPlaces, collect_merges, key_count, layer_maps
from ..report.ink import Array, to_png
from ..report.rendering import Figure, data_url, render_page, write_png
from ..report.tables import Table, to_json
from . import map_figures as measures
from .detections import draw_image, write_figures
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
    take_layers,
)
from .map_page import (
    Given,
    MapDistance,
    Titles,
    View,
    check_page_size,
    draw_layers,
    draw_merges,
    embed,
    layer_names,
    map_page,
    read_images,
    to_pixels,
)
from .partners import Partners, cka, compared, divergence, on_grids, pair_layers, partners_of

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
    rolled = torch.eye(0, dtype=torch.float32)
    for site, layout in zip(places, token_layouts(model), strict=True):
        seen = found.get(site.index)
        maps = None if seen is None else seen.weights[0].cpu()
        keys = KeyPlaces(layout.geometry) if seen is None else seen.places
        rolled = rolled if site.place else torch.eye(layout.num_tokens, dtype=torch.float32)
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


@dataclass(frozen=True)
class Attention:
    """What was seen of a model. A notebook shows it by itself: the figures, and the numbers by layer."""

    title: str
    notes: Sequence[str]
    """How the layers of a teacher stand beside the student's, in sentences."""
    figures: Mapping[str, Drawing]
    """Figures of matplotlib, by the names of their files."""
    numbers: JsonDict
    """As in `numbers.json`: `entropy` and `distance` by layer and head of each model; with a teacher also `pairs`, its
    layer for each layer of the student, and `js`, `cka` and `cka_random` by layer."""
    page: Path | None = None
    """The page, if a folder was written."""

    def _repr_html_(self) -> str:
        """Return HTML that holds its pictures."""
        pictures = {
            name: data_url(to_png(each, ground="white", dots_per_inch=90))
            for name, each in self.figures.items()
        }
        known = {"title": self.title, "notes": self.notes, "pictures": pictures}
        return render_page("visualize/notebook.html", **known, numbers=self._table())

    def _table(self) -> Table:
        """Return the means of the heads, and the distances, by layer."""
        columns: dict[str, Sequence[float | None]] = {}
        for name in ("student", "teacher"):
            if name not in self.numbers:
                continue
            layers = self.numbers["pairs"] if name == "teacher" else range(len(self.numbers[name]["entropy"]))
            if name == "teacher":
                columns["teacher's layer"] = layers
            for key in ("entropy", "distance"):
                heads = self.numbers[name][key]
                columns[f"{key}, {name}"] = [
                    None if layer is None or heads[layer] is None else fmean(heads[layer]) for layer in layers
                ]
        for key, words in {"js": "JS", "cka": "CKA", "cka_random": "CKA, random"}.items():
            if key in self.numbers:
                columns[words] = self.numbers[key]
        rows = zip(*columns.values(), strict=True)
        shown = [[layer, *(_digits(cell) for cell in row)] for layer, row in enumerate(rows)]
        return Table(["layer", *columns], shown)


def _digits(cell: float | None) -> str:
    return "" if cell is None else str(cell) if isinstance(cell, int) else f"{cell:.3g}"


@check_types()
@check_types("images")
def visualize(
    model: Model | Pretrained,
    /,
    images: Tensor | Given | Sequence[Given],
    out: str | PathLike[str] | None = None,
    *,
    teacher: Model | Pretrained | None = None,
    queries: Sequence[str | int] | str | int = (),
    layers: Sequence[int] | int | str = "*",
    **how: Unpack[LoadSettings],
) -> Attention:
    """Return pictures of what a model attends to, and their numbers; a notebook shows them.

    Of a detector or segmenter, given or named, they show what it finds: a batch then has values of 0..1. With `out`
    the pictures (PNG), `numbers.json` and `index.html` are written to this folder.

    Args:
        model: a model, what `load_pretrained` returns, a source by name, or a `DualViT`, whose student is looked at
            beside its teacher, with the pairs of layers and heads of its first loss that reads layers.
        images: image files, folders of them, `digits:N`, pictures of PIL, or a batch (B, C, H, W) that is normalized
            for the model; a teacher sees a file or picture by its own preprocessing, and a batch at its own size.
        out: the folder, which is made.
        teacher: a model to put beside it, in the same ways; of a `DualViT` with several teachers, the name of one.
            Layers are beside those that they learned from in the run that trained the student, else beside those
            at the same relative depth.
        queries: numbers of patches, row by row from 0, names of prefix tokens, and places `ROWxCOLUMN` in pixels;
            the class token by default, the patch in the middle without one. Patches of a pyramid have no numbers.
        layers: which to show, as in a plan (`0,5,9-11`, `-1`); all by default. Numbers are of all layers.
        how: `model`, `img_size` and the rest, as of `load_pretrained`, for a source by name.

    Raises:
        GraftError: a source or image that cannot be read, a layer or query that is not there, models that do not go
            together, or more maps than a page holds.
    """
    dense = dense_of(model)
    if dense is not None:
        of = {"teacher": teacher, "queries": queries, "layers": layers if layers != "*" else None, **how}
        return _look_at_found(dense, images, out, next((name for name in of if of[name]), None))
    loaded, partners = load_models(model, teacher, dict(how))
    own = loaded["student"].preprocessing
    chosen = chosen_layers(loaded["student"].model, layers)
    asked = read_queries(queries, loaded["student"])
    if isinstance(images, Tensor):
        _check_batch(images, loaded["student"])
    shown = read_images(images, own)
    if out is not None:
        check_page_size(layers_of(loaded, partners, chosen), len(shown))
    names = {name: model_name(each) for name, each in loaded.items()}
    if "teacher" in loaded:
        loaded[RANDOM] = replace(loaded["teacher"], model=build_untrained(loaded["teacher"]))
    seen = Seen(partners)
    embedded, figures = [], dict[str, Drawing]()
    for image in followed(shown, len(shown), "maps of the images"):
        given = {
            name: image.tensor(each.preprocessing, own).to(next(each.model.parameters()))
            for name, each in loaded.items()
        }
        looks = {name: look(each.model, given[name]) for name, each in loaded.items()}
        looks = seen.add(looks, loaded, given)
        pixels = {name: to_pixels(given[name], loaded[name].preprocessing) for name in looks}
        view = View(image.name, pixels, looks)
        if out is not None:
            embedded.append(embed(view, chosen))
        for query in asked:
            what = f"{image.name}: what {query.title(looks['student'].layouts)} attends to"
            figures |= draw_query(view, query, chosen, what, names)
    titles = Titles(page_title(names), names, layer_names(looks, chosen), seen.notes())
    chart, plain = chart_of(seen.charted(), seen.comparison()), seen.plain()
    page = None
    if out is not None:
        html = map_page(embedded, titles, asked[0], chart)
        page = write_folder(Path(out), figures, chart, plain, html)
    return Attention(titles.title, titles.notes, {**figures, "layers.png": chart.draw("light")}, plain, page)


def _look_at_found(
    model: DenseModel,
    images: Tensor | Given | Sequence[Given],
    out: str | PathLike[str] | None,
    of: str | None,
) -> Attention:
    """Return pictures of what a detector or segmenter finds. Raises ConfigError: `of` is of attention."""
    if of is not None:
        raise ConfigError(
            f"{of} is of attention, and a detector or segmenter shows what it finds: leave it out, or give the "
            "backbone by graftvit.load_pretrained of its folder"
        )
    shown = read_images(images, Preprocessing.of(model.backbone.body))
    with evaluating(model):
        figures = [
            draw_image(
                model, each.name, each.original[0] if isinstance(each.original, Tensor) else each.original
            )
            for each in shown
        ]
    title = f"What a {model.kind} finds"
    page = None if out is None else write_figures(figures, title, Path(out))
    drawn = {f"{each.name}.png": each.draw("light") for each in figures}
    return Attention(title, [f"{each.heading}: {each.caption}" for each in figures], drawn, {}, page)


def _check_batch(images: Tensor, student: Pretrained) -> None:
    """Raise DataError: images that cannot be shown to the student, or not drawn, or not of the size that it has."""
    check_images(images, student.model, values=True)
    _, *size = student.preprocessing.input_size
    if list(images.shape[-2:]) != size:
        raise DataError(
            f"images are {images.shape[-2]}x{images.shape[-1]}, and the model is looked at with {size[0]}x{size[1]}: "
            "resize one of them, the model by graftvit.models.resize"
        )
    if images.shape[1] not in (1, 3):
        raise DataError(f"images has {images.shape[1]} channels, which cannot be drawn: give 1 or 3")


def chart_of(numbers: dict[str, Numbers], comparison: MapDistance | None) -> Figure:
    """Return the chart of the numbers, of which those of a teacher are in the order of the student's layers."""
    return Figure("layers", "By layer", "", CHART, partial(draw_layers, numbers, comparison))


def write_folder(
    out: Path, figures: Mapping[str, Drawing], chart: Figure, numbers: JsonDict, page: str
) -> Path:
    """Write the figures, the chart, the numbers and the page; return the path of the page.

    The figures are named in numbers.json, and those of an earlier page in `out` that are not among them are removed.
    """
    older = _name_pictures(out / "numbers.json")
    for name, figure in followed(figures.items(), len(figures), "pictures"):
        write_bytes(out / name, to_png(figure, ground="white"))
    write_png(chart, out / "layers.png")
    write_text(out / "numbers.json", to_json({**numbers, "pictures": list(figures)}))
    write_text(out / "index.html", page)
    for name in older.difference(figures):
        (out / name).unlink(missing_ok=True)
    return out / "index.html"


def _name_pictures(path: Path) -> set[str]:
    """Return the pictures that an earlier page wrote beside its numbers; none without such a file."""
    try:
        names = json.loads(read_if_there(path) or "{}")["pictures"]
        return {name for name in names if Path(name).name == name and name.endswith(".png")}
    except (CheckpointError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return set()


def chosen_layers(student: nn.Module, layers: Sequence[int] | int | str) -> list[int]:
    """Return the layers to show. Raises ConfigError: one does not exist, or none of them has attention."""
    words = ",".join(map(str, layers)) if isinstance(layers, list | tuple) else str(layers)
    chosen = layer_numbers(words, plan_depth(student), "--layers")
    places = sites(student)
    if not any(places[layer].num_heads for layer in chosen):
        raise ConfigError(f"--layers {words}: no layer of these has attention, so there is nothing to show")
    return chosen


def read_queries(queries: Sequence[str | int] | str | int, student: Pretrained) -> list[Query]:
    """Return who asks. Raises ConfigError for one that is not there."""
    _, height, width = student.preprocessing.input_size
    layouts = token_layouts(student.model)
    words = queries if isinstance(queries, list | tuple) else [queries]
    if not words:
        return [default_query(layouts, (height, width))]
    return [read_query(str(word), layouts, (height, width)) for word in words]


class Seen:
    """Numbers of every image seen so far, by model; maps are dropped, because they are large."""

    def __init__(self, partners: Partners | None) -> None:
        self._partners = partners
        self._numbers: dict[str, list[Numbers]] = {}
        self._patches: dict[str, list[list[Tensor]]] = {}
        self._js: list[list[float | None]] = []
        self._notes: list[str] = []

    def add(
        self, looks: dict[str, Look], loaded: Mapping[str, Pretrained], images: Mapping[str, Tensor]
    ) -> dict[str, Look]:
        """Take the numbers of one image, and return what is shown: the teacher's layers in the student's order."""
        shown: dict[str, Look] = {name: each for name, each in looks.items() if name != RANDOM}
        for name, each in shown.items():
            self._numbers.setdefault(name, []).append(each.numbers())
        if self._partners is None:
            return shown
        own = looks["student"]
        for name, each in looks.items():
            beside = each if name == "student" else self._partners.beside(each, own)
            shown |= {name: beside} if name == "teacher" else {}
            pairs = zip(beside.layers, own.layers, strict=True)
            patches = [theirs.patches_on(ours.layout.grid) for theirs, ours in pairs]
            self._patches.setdefault(name, []).append(patches)
        on_grid = on_grids(loaded["teacher"].model, images["teacher"], shown["teacher"], own)
        self._js.append(divergence(on_grid, own))
        self._notes = [self._partners.words, *compared(shown["teacher"], own, on_grid)]
        return shown

    def notes(self) -> list[str]:
        """Return how a teacher's layers stand beside the student's, in sentences."""
        return self._notes

    def numbers(self) -> dict[str, Numbers]:
        """Return means over images, teacher last."""
        return {name: mean_numbers(found) for name, found in self._numbers.items()}

    def charted(self) -> dict[str, Numbers]:
        """Return the means, those of the teacher in the order of the student's layers."""
        return in_order(self.numbers(), self._partners)

    def plain(self) -> JsonDict:
        """Return what is written as numbers.json."""
        return to_plain(self.numbers(), self.comparison(), self._partners)

    def comparison(self) -> MapDistance | None:
        """Return the distance from the teacher; None without one."""
        if not self._js:
            return None
        layers = ([each for each in layer if each is not None] for layer in zip(*self._js, strict=True))
        js = [sum(layer) / len(layer) if layer else None for layer in layers]
        theirs, ours, random = (self._patches[name] for name in ("teacher", "student", RANDOM))
        return MapDistance(js, cka(theirs, ours), cka(theirs, random))


def in_order(numbers: dict[str, Numbers], partners: Partners | None) -> dict[str, Numbers]:
    """Return the numbers with those of a teacher in the order of the student's layers."""
    if partners is None:
        return numbers
    stages = numbers["student"].stages
    return numbers | {"teacher": take_layers(numbers["teacher"], partners.numbers(len(stages)), stages)}


def to_plain(numbers: dict[str, Numbers], between: MapDistance | None, partners: Partners | None) -> JsonDict:
    """Return `entropy` and `distance` by layer and head of each model, and by layer `js`, `cka` and `cka_random`.

    With a teacher `pairs` has its layer for each layer of the student.

    A layer without attention has null. A deformable merge has the mean `shift` of its places in pixels, and the share
    of places `outside` of the image.
    """
    models: JsonDict = {name: _plain_model(each) for name, each in numbers.items()}
    if partners is not None:
        models["pairs"] = partners.numbers(len(numbers["student"].stages))
    return models if between is None else models | asdict(between)


def _plain_model(numbers: Numbers) -> JsonDict:
    known: JsonDict = {"entropy": _lists(numbers.entropy), "distance": _lists(numbers.distance)}
    merges = [{"shift": float(shift), "outside": float(outside)} for shift, outside in numbers.merges]
    return known | ({"merges": merges} if merges else {})


def _lists(layers: Sequence[Array | None]) -> list[list[float] | None]:
    return [None if heads is None else heads.tolist() for heads in layers]


def load_models(
    model: Model | Pretrained, teacher: Model | Pretrained | None, how: JsonDict
) -> tuple[dict[str, Pretrained], Partners | None]:
    """Return the student and, where there is one, the teacher, with the teacher's layer beside each layer.

    A teacher by name is loaded at the given image size, at that of the run, or at its own.
    """
    loaded = {"student": describe(model, **how)}
    student = loaded["student"]
    check_supported(student.model, copied=True)
    if isinstance(model, DualViT) and (teacher is None or teacher in [*model.teachers]):
        found, partners = _teacher_of(model, teacher, student)
    elif teacher is None:
        return loaded, None
    else:
        size = how.get("img_size") or _size_in_run(student)
        named = isinstance(teacher, str | PathLike) and size is not None
        found = describe(teacher, "teacher", **({"img_size": size} if named else {}))
        check_supported(found.model, copied=True)
        partners = pair_layers(found.model, student)
    if found is None or partners is None:
        return loaded, None
    channels = [each.preprocessing.input_size[0] for each in (found, student)]
    if channels[0] != channels[1]:
        raise TransferError(f"the teacher takes {channels[0]} channels and the student {channels[1]}")
    return loaded | {"teacher": found}, partners


def _teacher_of(
    dual: DualViT, name: object, student: Pretrained
) -> tuple[Pretrained | None, Partners | None]:
    """Return a teacher with the pairs of its first loss that reads layers; None where it has no attention to show."""
    terms = [term for term in dual.terms if name in (None, term.side.name)]
    term = next((each for each in terms if each.method.uses_layers), terms[0])
    side = term.side
    try:
        check_supported(side.model, copied=True)
        found = side.loaded or describe_model(side.model, **side.normalization._asdict())
    except GraftError:
        if name is None:
            return None, None
        raise
    if term.method.uses_layers:
        return found, partners_of(term.plan.links, term.settings)
    return found, pair_layers(side.model, replace(student, provenance={}))


def _size_in_run(student: Pretrained) -> Any:
    """Return the image size at which the run of a student loads its teacher; None where no run is known."""
    recipe = student.provenance.get("recipe")
    teacher = recipe.get("teacher") if isinstance(recipe, Mapping) else None
    if not isinstance(teacher, Mapping) or not teacher.get("source"):
        return None
    return teacher.get("img_size") or student.preprocessing.input_size[1:]


def layers_of(
    loaded: Mapping[str, Pretrained], partners: Partners | None, chosen: Sequence[int]
) -> list[tuple[nn.Module, list[int]]]:
    """Return the models with the layers that are shown of them, the student first."""
    found = [(loaded["student"].model, list(chosen))]
    if partners is not None:
        beside = [partners.of[layer].layer for layer in chosen if layer in partners.of]
        found.append((loaded["teacher"].model, beside))
    return found


def draw_query(
    view: View, query: Query, layers: Sequence[int], title: str, names: Mapping[str, str]
) -> dict[str, Drawing]:
    """Return the pictures of one query by file: the student's layers and heads, its merges, the teacher beside it."""
    own, name, pixels = view.looks["student"], f"{view.name}_{query.word}", view.pixels["student"]
    drawn = {f"{name}.png": draw_grid(pixels, own, query, layers, f"{title}\n{names['student']}")}
    if own.merges:
        words = f"{view.name}: what deformable merges read"
        drawn[f"{name}_merges.png"] = draw_merges(pixels, own.merges, query, words)
    theirs = view.looks.get("teacher")
    if theirs is not None and any(query.token(layout) is not None for layout in theirs.layouts):
        both = f"{title}\nteacher: {names['teacher']}\nstudent: {names['student']}"
        pictures = [view.pixels["teacher"], pixels]
        drawn[f"{name}_teacher.png"] = draw_beside(pictures, [theirs, own], query, layers, both)
    return drawn


LONGEST_NAME = 48


def model_name(loaded: Pretrained) -> str:
    """Return the name of a model for titles: its source, or the architecture of a model that was made in Python."""
    name = loaded.architecture if loaded.source == MADE_HERE else loaded.source
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def page_title(names: Mapping[str, str]) -> str:
    return f"Attention of {names['student']}" + (f" beside {names['teacher']}" if "teacher" in names else "")
