"""The page: images, maps and code in one HTML file that asks nothing of the network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ....models.errors import ConfigError, JsonDict
from ....models.families import sites
from ..key_places import KeyPlaces
from ..layer_maps import key_count
from ..merge_places import MergePlaces
from ..report.heat import HEAT, SIGNED
from ..report.pages import Plot, data_url, render_page
from .map_figures import layer_name
from .merge_figures import merge_name
from .queries import Query, token_name
from .shown_images import Shown
from .shown_layers import ShownLayer, ShownLook

MAX_MEGABYTES = 64
"""Of maps in a page, before base64 makes a third more of them."""
TOP = 127
SCALE, KEY = 4, 4
"""Bytes of the scale of a row, and of the place of a key in a window."""


@dataclass(frozen=True)
class View:
    """One image, and what each model did with it (by name: `student`, `teacher`)."""

    shown: Shown
    looks: Mapping[str, ShownLook]


def check_page_size(
    models: Sequence[nn.Module], images: int, layers: Sequence[int], *, rollouts: bool = True
) -> None:
    """Raise ConfigError where the maps of `models` would make a page that is too large."""
    image_bytes = sum(_bytes(model, layer, rollouts) for model in models for layer in layers)
    megabytes = images * image_bytes / 1e6
    if megabytes > MAX_MEGABYTES:
        raise ConfigError(
            f"the page would hold {megabytes:.0f} MB of maps of {images} images and {len(layers)} layers, and at most "
            f"{MAX_MEGABYTES} are taken; give fewer images, or fewer layers by --layers"
        )


def _bytes(model: nn.Module, layer: int, rollouts: bool) -> int:
    """Return the bytes of a layer's maps, and of its rollout, on one image."""
    site = sites(model)[layer]
    tokens, keys = site.shape.geometry.num_tokens, key_count(model, site)
    windows = KEY * keys if keys < tokens else 0
    rolled = tokens + SCALE if rollouts else 0
    return tokens * (site.num_heads * (keys + SCALE) + windows + rolled)


def map_page(images: Sequence[JsonDict], layers: Sequence[str], query: Query, chart: Plot, title: str) -> str:
    """Return the page; `images` are those of `embed`, `layers` their names, `chart` the numbers by layer."""
    data = {
        "layers": list(layers),
        "query": query.word if query.place is None else list(query.place),
        "heat": _colors(HEAT),
        "signed": _colors(SIGNED),
        "images": list(images),
    }
    words = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return render_page("visualize/map_page.html", title=title, chart=chart, data=words)


def layer_names(look: ShownLook, layers: Sequence[int]) -> list[str]:
    """Return the names of the chosen layers."""
    return [layer_name(look, layer) for layer in layers]


def embed(view: View, layers: Sequence[int]) -> JsonDict:
    """Return what the page needs of an image: the picture, and each model's maps of the chosen layers."""
    file = io.BytesIO()
    Image.fromarray(view.shown.pixels).save(file, format="PNG")
    height, width = view.shown.pixels.shape[:2]
    models = {name: [_layer(look.layers[layer]) for layer in layers] for name, look in view.looks.items()}
    return {
        "name": view.shown.name,
        "url": data_url(file.getvalue()),
        "size": [height, width],
        "models": models,
        "merges": {name: [_merge(merge) for merge in look.merges] for name, look in view.looks.items()},
    }


def _merge(merge: MergePlaces) -> JsonDict:
    """Return the places that a merge reads, down and right in parts of the image, as bytes."""
    return {
        "name": merge_name(merge),
        "grid": merge.merged,
        "token": merge.token,
        "places": _text(merge.in_image().numpy().astype("<f4").tobytes()),
        "shift": float(merge.shift().mean()),
    }


def _layer(layer: ShownLayer) -> JsonDict:
    """Return the maps of a layer, head by head, and its rollout, as bytes with a scale a row."""
    maps = [] if layer.maps is None else [_quantized(head) for head in layer.maps]
    layout = layer.layout
    names = [token_name(token, layout) for token in range(layout.num_prefix)]
    return {
        "grid": layout.grid,
        "prefix": names,
        "words": layout.prefix,
        "signed": layer.signed,
        "heads": maps,
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
