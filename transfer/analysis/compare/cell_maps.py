"""Where a cell's model looks: the mean of the heads for one query on a few test images, kept in the cell's folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from ....checkpoints.files import open_regular
from ....checkpoints.pretrained import Pretrained
from ....checkpoints.safety.archive import open_archive, read_arrays
from ....models.errors import ConfigError, GraftError
from ....models.families import sites
from ...config import DataConfig
from ..layer_maps import layer_maps
from ..report.arrays import write_arrays
from ..report.ink import Array
from ..spread_images import preprocessed, spread_images
from ..visualize.look import token_layouts
from ..visualize.queries import Query, default_query
from ..visualize.shown_images import to_pixels

logger = logging.getLogger(__name__)

FILE = "attention.npz"
IMAGES, LAYERS = 2, 3
"""The most images and layers of a cell."""


@dataclass(frozen=True)
class CellMap:
    """A layer's attention to one image for one query."""

    heat: Array
    """The mean of the heads' weights, by rows and columns of the keys; empty for a layer without attention."""
    extent: tuple[float, float]
    """The parts of the image's height and width that the keys cover."""
    grid: tuple[int, int]
    """Rows and columns of the layer's tokens."""
    asking: tuple[int, int] | None
    """The patch that asks; None for a prefix token."""


@dataclass(frozen=True)
class CellMaps:
    """What is kept of a cell: the images (H, W, 3) in bytes, and by image and layer what the query attends to."""

    query: str
    pictures: list[Array]
    maps: dict[tuple[int, int], CellMap]

    @property
    def layers(self) -> list[int]:
        return sorted({layer for _, layer in self.maps})


def keep_maps(loaded: Pretrained, data: DataConfig, folder: Path) -> None:
    """Write the maps of a model to its cell. A model or data set that has none is named in the log, and leaves no file.

    Raises WriteFailedError as `write_file`.
    """
    try:
        found = read_maps(loaded, data)
    except GraftError as error:
        logger.warning("%s: no attention maps: %s", folder.name, error)
        return
    arrays: dict[str, Array] = {"query": np.array(found.query), "pictures": np.stack(found.pictures)}
    for (image, layer), each in found.maps.items():
        name = f"{image}.{layer}"
        arrays[f"{name}.heat"], arrays[f"{name}.extent"] = each.heat, np.array(each.extent)
        arrays[f"{name}.grid"], arrays[f"{name}.asking"] = np.array(each.grid), np.array(each.asking or ())
    write_arrays(folder / FILE, arrays)


def load_maps(folder: Path) -> CellMaps | None:
    """Return the maps of a cell; None where it has kept none, such as cells of older versions.

    Raises ConfigError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with open_regular(path, refusal=ConfigError) as file:
            size = file.seek(0, os.SEEK_END)
            with open_archive(file) as archive:
                return _to_maps(read_arrays(archive, size))
    except ConfigError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise ConfigError(
            f"{path} is damaged ({error}): remove it, and the report has no maps of it"
        ) from error


def _to_maps(arrays: Mapping[str, Array]) -> CellMaps:
    """Return the maps that `keep_maps` wrote. Raises ValueError, TypeError or KeyError: it did not write these."""
    maps = {}
    for name in (name.removesuffix(".heat") for name in arrays if name.endswith(".heat")):
        image, layer = map(int, name.split("."))
        heat = arrays[f"{name}.heat"]
        height, width = map(float, arrays[f"{name}.extent"])
        rows, columns = map(int, arrays[f"{name}.grid"])
        asking = tuple(map(int, arrays[f"{name}.asking"]))
        if heat.dtype.kind != "f" or heat.ndim != 2 or not np.isfinite(heat).all():
            raise ValueError(f"its {name}.heat is no map")
        if not (0 < height <= 1 and 0 < width <= 1 and rows > 0 and columns > 0 and len(asking) in (0, 2)):
            raise ValueError(f"its map {name} has no place in an image")
        maps[image, layer] = CellMap(
            heat, (height, width), (rows, columns), (asking[0], asking[1]) if asking else None
        )
    found = CellMaps(str(arrays["query"]), list(arrays["pictures"]), maps)
    if arrays["pictures"].dtype != np.uint8 or arrays["pictures"].shape[3:] != (3,):
        raise ValueError("its pictures are no images")
    if not maps or sorted(maps) != sorted(product(range(len(found.pictures)), found.layers)):
        raise ValueError("it lacks maps of some images")
    return found


def read_maps(loaded: Pretrained, data: DataConfig) -> CellMaps:
    """Compute the maps of a model for its default query, on test images that are spread over the data set.

    Raises GraftError: a model without maps, or images that cannot be read.
    """
    model, spec = loaded.model, loaded.preprocessing
    channels, *sides = spec.input_size
    query = default_query(token_layouts(model), (sides[0], sides[1]))
    data = data.model_copy(update={"workers": 0})
    source = spread_images(data, channels, IMAGES)
    images = torch.cat(list(preprocessed(source, data, spec, IMAGES)))
    pictures = [to_pixels(image[None], spec) for image in images]
    return CellMaps(query.title(token_layouts(model)), pictures, _maps(loaded, images, query))


def _maps(loaded: Pretrained, images: torch.Tensor, query: Query) -> dict[tuple[int, int], CellMap]:
    model, layouts = loaded.model, token_layouts(loaded.model)
    tokens = {layer: layouts[layer] for layer in _spread_layers(len(sites(model)))}
    asked = {layer: query.token(layout) for layer, layout in tokens.items()}
    wanted = {layer: token for layer, token in asked.items() if token is not None}
    seen = layer_maps(model, images, list(wanted), asking=wanted)
    maps: dict[tuple[int, int], CellMap] = {}
    for layer, layout in tokens.items():
        place = (asked[layer] or 0) - layout.num_prefix
        patch = divmod(place, layout.grid[1]) if asked[layer] is not None and place >= 0 else None
        for image in range(len(images)):
            heat, extent = np.zeros((0, 0), np.float32), (1.0, 1.0)
            if layer in seen:
                places, row = seen[layer].places, seen[layer].weights[image, :, 0].mean(0)
                heat, extent = places.picture(row.cpu(), wanted[layer]).numpy(), places.extent
            maps[image, layer] = CellMap(heat, extent, layout.grid, patch)
    return maps


def _spread_layers(depth: int) -> list[int]:
    """Return the first layer, the last, and one in the middle."""
    return sorted({0, depth // 2, depth - 1})[-LAYERS:]
