"""The page: images, maps and code in one HTML file that asks nothing of the network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ....models.errors import ConfigError
from ....models.families import attention_shape, token_layout
from ....models.json_types import JsonDict
from ..report.heat import HEAT, SIGNED
from ..report.pages import Plot, data_url, render_page
from .look import Look, token_name
from .shown_images import Shown

MAX_MEGABYTES = 64
"""Of maps in a page, before base64 makes a third more of them."""
TOP = 127


@dataclass(frozen=True)
class View:
    """One image, what each model did with it (by name: `student`, `teacher`), and the rollouts."""

    shown: Shown
    looks: dict[str, Look]
    rolled: dict[str, Tensor]


def check_page_size(models: Sequence[nn.Module], images: int, layers: int) -> None:
    """Raise ConfigError where the maps of `models` would make a page that is too large."""
    row_bytes = 0
    for model in models:
        tokens = token_layout(model).num_tokens
        row_bytes += (attention_shape(model).num_heads + 1) * tokens * (tokens + 4)
    megabytes = images * layers * row_bytes / 1e6
    if megabytes > MAX_MEGABYTES:
        raise ConfigError(
            f"the page would hold {megabytes:.0f} MB of maps of {images} images and {layers} layers, and at most "
            f"{MAX_MEGABYTES} are taken; give fewer images, or fewer layers by --layers"
        )


def map_page(images: Sequence[JsonDict], layers: Sequence[int], query: int, chart: Plot, title: str) -> str:
    """Return the page; `images` are those of `embed`, `chart` the numbers by layer."""
    data = {
        "layers": list(layers),
        "query": query,
        "heat": _colors(HEAT),
        "signed": _colors(SIGNED),
        "images": list(images),
    }
    words = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return render_page("visualize/map_page.html", title=title, chart=chart, data=words)


def embed(view: View, layers: Sequence[int]) -> JsonDict:
    """Return what the page needs of an image: the picture, and each model's maps of the chosen layers."""
    file = io.BytesIO()
    Image.fromarray(view.shown.pixels).save(file, format="PNG")
    height, width = view.shown.pixels.shape[:2]
    models = {name: _model(look, view.rolled[name], layers) for name, look in view.looks.items()}
    return {
        "name": view.shown.name,
        "url": data_url(file.getvalue()),
        "size": [height, width],
        "models": models,
    }


def _model(look: Look, rolled: Tensor, layers: Sequence[int]) -> JsonDict:
    """Return the maps of the chosen layers, each head and then the rollout, as bytes with a scale a row."""
    weights, scales = [], []
    for layer in layers:
        for rows in (*look.maps[layer], rolled[layer]):
            quantized, scale = quantize(rows.numpy())
            weights.append(quantized)
            scales.append(scale)
    prefix = look.layout.num_prefix
    return {
        "grid": look.layout.grid,
        "prefix": [token_name(token, look.layout) for token in range(prefix)],
        "heads": look.maps.shape[1],
        "signed": [look.signed[layer] for layer in layers],
        "weights": _text(np.stack(weights).tobytes()),
        "scales": _text(np.stack(scales).astype("<f4").tobytes()),
    }


def quantize(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return rows (N, N) as whole numbers up to ±127, in parts of the largest weight of each row, and that weight.

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
