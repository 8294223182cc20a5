"""From a model and a data set to a folder: the mean of its attention maps over the images, as arrays and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ....models.families import sites
from ...config import DataConfig
from ...data.augment import with_settings
from ...data.loading import followed
from ..layer_maps import KeyPlaces, LayerMap, layer_maps, preprocessed, spread_images
from ..report.ink import Array, write_arrays
from . import map_figures as measures
from .map_figures import LayerLook, Look, Numbers
from .map_page import Titles, View, check_page_size, embed, layer_names, map_page, to_pixels
from .visualize import (
    chart_of,
    chosen_layers,
    count_weights,
    draw_query,
    in_order,
    layers_of,
    load_models,
    model_name,
    page_title,
    read_queries,
    to_plain,
    token_layouts,
    write_folder,
)

# Attention maps averaged over images, one batch at a time: the memory does not depend on the number of images.
#
# Shape suffixes: B batch, H heads, N queries, M keys.

MAX_BATCH_BYTES = 2**28
WEIGHT_BYTES, SUM_BYTES = 4, 8
"""Of a weight in float32, as maps are computed and written, and in float64, as they are added."""


@dataclass(frozen=True)
class MeanMap:
    """A layer's map, (H, N, M), and the entropy and mean distance of its heads (H), as means over images."""

    weights: Tensor
    entropy: Tensor
    distance: Tensor
    places: KeyPlaces


class MapSums:
    """Sums over images of each layer's map, in float64, and of the entropy and mean distance of its heads."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[int, list[Tensor]] = {}
        self._places: dict[int, KeyPlaces] = {}

    def add(self, maps: dict[int, LayerMap]) -> None:
        """Add the maps (B, H, N, M) of all layers on one batch of images."""
        for layer, found in maps.items():
            self._places[layer] = found.places
            weights, start = found.weights, found.places.geometry.num_prefix
            distance = measures.mean_distance(weights[..., start:, start:], found.places.distances())
            new = [weights, measures.entropy(weights), distance]
            if layer not in self._sums:
                self._sums[layer] = [each.new_zeros(each.shape[1:], dtype=torch.float64) for each in new]
            for total, each in zip(self._sums[layer], new, strict=True):
                for image in each:  # a copy of the whole batch in float64 would take twice its memory
                    total += image
        self.count += len(next(iter(maps.values())).weights)

    def means(self) -> dict[int, MeanMap]:
        """Return the means by layer, in float64."""
        means = {}
        for layer, sums in self._sums.items():
            weights, entropy, distance = (total / self.count for total in sums)
            means[layer] = MeanMap(weights, entropy, distance, self._places[layer])
        return means


def average_maps(model: nn.Module, batches: Iterable[Tensor], layers: Sequence[int]) -> dict[int, MeanMap]:
    """Return the mean over all images of the maps of these layers; without those of blocks that have no attention.

    The model runs in eval mode and is left as it was. Raises UnsupportedModelError: a model of another kind.
    """
    sums = MapSums()
    for images in batches:
        sums.add(layer_maps(model, images, layers))
    return sums.means()


def batch_that_fits(weights: int, wanted: int) -> int:
    """Return the number of images in a batch: `wanted`, or less so that their maps take at most 256 MB."""
    return max(1, min(wanted, MAX_BATCH_BYTES // (WEIGHT_BYTES * max(1, weights))))


NAME = "average"
FEWER = "fewer layers by --layers, or a smaller --img_size"


def visualize_average(
    source: str,
    data: DataConfig,
    out: Path,
    *,
    count: int | None = None,
    teacher: str | None = None,
    queries: Sequence[str] = (),
    layers: str = "*",
    tell: Callable[[str], object] = lambda line: None,
    **how: Any,
) -> Path:
    """Write the mean attention maps over images of `data` to the folder `out`, and return the path of the page.

    `average.npz` has the maps as arrays; PNGs, `numbers.json` and `index.html` are as of `visualize`, without
    rollouts. Nothing is written before the last image is read, and each file is written whole or not at all.

    Args:
        source: any source of weights, as of `load_pretrained`.
        data: the data set, of which `val_split` is read.
        count: how many images, spread evenly over the split; all by default.
        teacher: a source to put beside it, as of `visualize`.
        queries: as of `visualize`; they choose the pictures, while the arrays have all queries.
        layers: which layers, as of `visualize`. The others are not computed.
        tell: is called with the size of the result.
        how: `model`, `img_size` and the rest, as of `load_pretrained`, for `source`.

    Raises GraftError as `visualize`, and where the data set cannot be read.
    """
    loaded, partners = load_models(source, teacher, how)
    chosen = chosen_layers(loaded["student"].model, layers)
    asked = read_queries(queries, loaded["student"])
    shown = layers_of(loaded, partners, chosen)
    check_page_size(shown, 1, rollouts=False)
    own = {name: wanted for name, (_, wanted) in zip(loaded, shown, strict=True)}
    weights = {
        name: count_weights(each.model, own[name], SUM_BYTES, "sums of the maps", FEWER)
        for name, each in loaded.items()
    }
    images = spread_images(data, loaded["student"].preprocessing.input_size[0], count)
    for name, found in weights.items():
        size = f"{WEIGHT_BYTES * found / 1e6:.1f} MB in {out / _file(name)}"
        tell(f"{name}: mean of {len(images):,} images, {size}")
    pictures, means = {name: MeanPicture() for name in loaded}, {}
    for name, each in loaded.items():
        fits = batch_that_fits(weights[name], data.eval_batch_size or data.batch_size)
        batches = preprocessed(images, data, with_settings(each.preprocessing, data), fits)
        seen = followed(batches, math.ceil(len(images) / fits), f"maps of the {name}")
        means[name] = average_maps(each.model, pictures[name].watch(seen), own[name])
    for name, each in loaded.items():
        _write_arrays(out / _file(name), each.model, means[name], pictures[name].count)
    looks = {name: shown_means(each.model, means[name]) for name, each in loaded.items()}
    numbers = {name: _numbers(looks[name], found) for name, found in means.items()}
    if partners is not None:
        looks["teacher"] = partners.beside(looks["teacher"], looks["student"])
    pixels = {
        name: to_pixels(pictures[name].mean()[None], each.preprocessing) for name, each in loaded.items()
    }
    view = View(NAME, pixels, looks)
    of_images, figures = f"mean of {pictures['student'].count:,} images", dict[str, Figure]()
    names = {name: model_name(each) for name, each in loaded.items()}
    for query in asked:
        words = query.title(looks["student"].layouts)
        figures |= draw_query(view, query, chosen, f"{of_images}: what {words} attends to", names)
    notes = [] if partners is None else [partners.words]
    titles = Titles(f"{page_title(names)}, {of_images}", names, layer_names(looks, chosen), notes)
    chart = chart_of(in_order(numbers, partners), None)
    page = map_page([embed(view, chosen)], titles, asked[0], chart)
    return write_folder(out, figures, chart, to_plain(numbers, None, partners), page)


class MeanPicture:
    """The mean of the images that pass."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None

    def watch(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield the batches (B, C, H, W) and add them up."""
        for images in batches:
            total = images.double().sum(0)
            self._sum = total if self._sum is None else self._sum + total
            self.count += len(images)
            yield images

    def mean(self) -> Tensor:
        """Return the mean image (C, H, W), normalized as the images are."""
        assert self._sum is not None
        return (self._sum / self.count).float()


def shown_means(model: nn.Module, means: dict[int, MeanMap]) -> Look:
    """Return the layers of a model with their mean maps, as pictures and pages show them; without rollouts."""
    layers = []
    for site, layout in zip(sites(model), token_layouts(model), strict=True):
        found = means.get(site.index)
        maps = None if found is None else found.weights.float()
        places = KeyPlaces(layout.geometry) if found is None else found.places
        layers.append(LayerLook(site.stage, layout, maps, places))
    return Look(layers)


def _numbers(look: Look, means: dict[int, MeanMap]) -> Numbers:
    """Return the means over images of the heads' numbers; a mean map has a larger entropy than its images."""
    of_layer = [means.get(number) for number in range(len(look.layers))]
    return Numbers(
        [None if each is None else each.entropy.numpy() for each in of_layer],
        [None if each is None else each.distance.numpy() for each in of_layer],
        [0 if each is None else each.weights.shape[-1] for each in of_layer],
        [layer.stage for layer in look.layers],
        np.zeros((0, 2)),
    )


def _write_arrays(path: Path, model: nn.Module, means: dict[int, MeanMap], count: int) -> None:
    """Write the mean maps as arrays, under the names that layers have in a plan (`3`, `stage2.0`)."""
    arrays: dict[str, Array] = {"images": np.array(count)}
    for site in sites(model):
        found = means.get(site.index)
        if found is None:
            continue
        places, name = found.places, site.name
        arrays[f"{name}.maps"] = found.weights.float().numpy()
        arrays[f"{name}.prefix"] = np.array(places.geometry.num_prefix)
        arrays[f"{name}.queries"] = np.array(places.geometry.grid)
        arrays[f"{name}.keys"] = np.array(places.grid)
        if places.windows is not None:
            arrays[f"{name}.tokens"] = places.window_tokens().to(torch.int32).numpy()
    write_arrays(path, arrays)


def _file(name: str) -> str:
    return f"{NAME}.npz" if name == "student" else f"{NAME}_{name}.npz"
