"""Pictures of attention over an image: a grid of layers and heads, and a teacher beside its student."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ....models.errors import ConfigError
from ....models.families import TokenLayout
from ...metrics.distance import LEAST_ROWS, DistanceSums
from ..layer_maps import KeyPlaces, MergePlaces
from ..report.ink import (
    INK,
    Array,
    Panel,
    Scale,
    color_bar,
    draw_nothing,
    draw_panel,
    draw_picture,
    new_figure,
)

# What attention maps and tokens come to in numbers: shares, rollout, entropy, distance, CKA.
#
# A map with negative weights, or rows that do not sum to one, is read as *shares* first: |A| with rows divided by
# their sums. Of softmax attention these are the map itself.


def shares(maps: Tensor) -> Tensor:
    """Return |A| with each row (the last dimension) divided by its sum; a row of zeros is spread evenly."""
    weights = maps.abs()
    total = weights.sum(-1, keepdim=True)
    even = torch.full_like(weights, 1 / maps.shape[-1])
    return torch.where(total > 0, weights / total.clamp_min(torch.finfo(maps.dtype).tiny), even)


def roll(before_NN: Tensor, layer_NN: Tensor) -> Tensor:
    """Return the rollout after a layer: R_l = (A_l + I)/2 · R_{l-1}, R_0 = I, A_l the mean of the heads' shares
    (Abnar and Zuidema, arXiv:2005.00928, equation 1). Rows that sum to one keep doing so."""
    return (layer_NN @ before_NN + before_NN) / 2


def entropy(maps: Tensor) -> Tensor:
    """Return the mean over queries of the entropy of a row's shares, in nats: (..., N, N) to (...)."""
    rows = shares(maps)
    return -torch.xlogy(rows, rows).sum(-1).mean(-1)


def mean_distance(maps: Tensor, distances: Tensor) -> Tensor:
    """Return how far a patch looks: (..., P, M) to (...), in patches.

    The mean over patches of Σ_j a_ij d_ij, with d (P, M) the distances to the M keys and a the row's shares among
    them; prefix tokens have no place and are left out.
    """
    return (shares(maps) * distances.to(maps)).sum(-1).mean(-1)


def linear_cka(x_SC: Tensor, y_SD: Tensor) -> float | None:
    """Return the debiased linear CKA of two models' features of the same S samples, as `Distance.cka`; in float64."""
    if len(x_SC) < LEAST_ROWS:
        return None
    sums = DistanceSums()
    sums.update(x_SC.double(), y_SD.double(), torch.ones(len(x_SC), dtype=torch.bool))
    return sums.result().cka


# Who asks: a prefix token, or the token at a place of the image, in the grid of every stage.

PIXEL = re.compile(r"(\d+)x(\d+)")
Size = tuple[int, int]


@dataclass(frozen=True)
class Query:
    """A token that asks, as a word of `--query`."""

    word: str
    place: tuple[float, float] | None
    """Where in the image, down and to the right, in parts of its height and width; None for a prefix token."""

    def token(self, layout: TokenLayout) -> int | None:
        """Return the number of the token in a layer with these tokens; None if it has no such prefix token."""
        if self.place is None:
            return layout.prefix.index(self.word) if self.word in layout.prefix else None
        row, column = (int(part * side) for part, side in zip(self.place, layout.grid, strict=True))
        return layout.num_prefix + row * layout.grid[1] + column

    def patch(self, layout: TokenLayout) -> tuple[int, int] | None:
        """Return row and column of the token in a layer with these tokens; None if it is no patch of them."""
        token = self.token(layout)
        at = -1 if token is None else token - layout.num_prefix
        return divmod(at, layout.grid[1]) if at >= 0 else None

    def title(self, layouts: Sequence[TokenLayout]) -> str:
        """Return who asks, in words; `layouts` are those of the layers."""
        asked = next((layout for layout in layouts if self.token(layout) is not None), layouts[0])
        token = self.token(asked)
        if token is not None and (self.place is None or _have_one_grid(layouts)):
            return ("the " if self.place is None else "") + token_name(token, asked)
        row, column = self.word.split("x")
        return f"the pixel at row {row}, column {column}"


def read_query(word: str, layouts: Sequence[TokenLayout], image: Size) -> Query:
    """Read a query: a prefix token (`cls`, `reg0`), a place `ROWxCOLUMN` in pixels, or a patch by its number.

    Patches are numbered row by row from 0, in models whose layers all have one grid.

    Raises ConfigError for one that is not there.
    """
    names = list(dict.fromkeys(name for layout in layouts for name in layout.prefix))
    if word in names:
        return Query(word, None)
    pixel = PIXEL.fullmatch(word)
    if pixel is not None and int(pixel[1]) < image[0] and int(pixel[2]) < image[1]:
        return Query(word, ((int(pixel[1]) + 0.5) / image[0], (int(pixel[2]) + 0.5) / image[1]))
    rows, columns = layouts[0].grid
    numbered = _have_one_grid(layouts)
    if numbered and word.isdecimal() and int(word) < rows * columns:
        row, column = divmod(int(word), columns)
        return Query(word, ((row + 0.5) / rows, (column + 0.5) / columns))
    valid = ", ".join([*([f"patches 0 to {rows * columns - 1}"] if numbered else []), *names])
    raise ConfigError(
        f"--query {word!r}: valid are {valid}{', and ' if valid else ''}places in pixels, 0x0 to "
        f"{image[0] - 1}x{image[1] - 1} (row x column)"
    )


def default_query(layouts: Sequence[TokenLayout], image: Size) -> Query:
    """Return the class token, or the patch in the middle of a model without one; of a pyramid the middle pixel."""
    if not _have_one_grid(layouts):
        return read_query(f"{image[0] // 2}x{image[1] // 2}", layouts, image)
    height, width = layouts[0].grid
    word = "cls" if "cls" in layouts[0].prefix else str((height // 2) * width + width // 2)
    return read_query(word, layouts, image)


def token_name(token: int, layout: TokenLayout) -> str:
    """Return the name of a token in titles."""
    if token < layout.num_prefix:
        return {"cls": "class token"}.get(layout.prefix[token], layout.prefix[token])
    row, column = divmod(token - layout.num_prefix, layout.grid[1])
    return f"patch {token - layout.num_prefix} (row {row}, column {column})"


def _have_one_grid(layouts: Sequence[TokenLayout]) -> bool:
    return len({layout.grid for layout in layouts}) == 1


# What pictures and pages show of a model: the maps of its layers, and the places that its merges read.


@dataclass(frozen=True)
class LayerLook:
    """The attention of a layer, on one image or as a mean; float32."""

    stage: int
    layout: TokenLayout
    maps: Tensor | None
    """(H, N, M), over the keys of `places`; None for a block without attention."""
    places: KeyPlaces
    rolled: Tensor | None = None
    """The rollout from the first layer of the stage, (N, N); None in a mean."""
    tokens: Tensor | None = None
    """The tokens (N, C) after the block; None in a mean."""
    number: int | None = None
    """Of a teacher's layer beside a student's, its number in the teacher."""
    groups: Sequence[tuple[int, ...] | None] | None = None
    """Of such a layer, its heads for each head of the student; None where nothing says which."""

    @property
    def heads(self) -> int:
        return 0 if self.maps is None else len(self.maps)

    @property
    def signed(self) -> bool:
        """Whether some weight is negative."""
        return self.maps is not None and bool((self.maps < 0).any())

    @property
    def patches(self) -> Tensor:
        """Return the tokens after the block without prefix tokens; none in a mean."""
        return torch.zeros(0) if self.tokens is None else self.tokens[self.layout.num_prefix :]

    def patches_on(self, grid: tuple[int, int]) -> Tensor:
        """Return the same where the patches have this grid; none where they have another."""
        return self.patches if self.layout.grid == grid else self.patches[:0]

    def entropy(self) -> Array | None:
        """Return the entropy of each head (H), in nats."""
        return None if self.maps is None else entropy(self.maps).numpy()

    def distance(self) -> Array | None:
        """Return the mean distance of each head (H), in patches of the stage."""
        if self.maps is None:
            return None
        start = self.layout.num_prefix
        return mean_distance(self.maps[:, start:, start:], self.places.distances()).numpy()

    def shares_of_tokens(self, skip: int = 0) -> Tensor | None:
        """Return the shares of all tokens, (H, N, N), without the first `skip` ones."""
        return None if self.maps is None else shares(self.places.on_tokens(self.maps)[:, skip:, skip:])


@dataclass(frozen=True)
class Numbers:
    """By layer, those of each head (H), on an image or means over images; None for a layer without attention."""

    entropy: Sequence[Array | None]
    distance: Sequence[Array | None]
    keys: Sequence[int]
    """The number of keys of each query, from which the largest entropy follows."""
    stages: Sequence[int]
    merges: Array
    """By deformable merge: the mean shift of a place in pixels, and the share of places outside of the image."""


@dataclass(frozen=True)
class Look:
    """The layers of a model, and its deformable merges."""

    layers: Sequence[LayerLook]
    merges: Sequence[MergePlaces] = ()

    @property
    def layouts(self) -> list[TokenLayout]:
        return [layer.layout for layer in self.layers]

    def numbers(self) -> Numbers:
        """Return all but the maps."""
        return Numbers(
            [layer.entropy() for layer in self.layers],
            [layer.distance() for layer in self.layers],
            [0 if layer.maps is None else layer.maps.shape[-1] for layer in self.layers],
            [layer.stage for layer in self.layers],
            np.array([[each.shift().mean(), each.outside().mean()] for each in self.merges]).reshape(-1, 2),
        )


def take_layers(numbers: Numbers, layers: Sequence[int | None], stages: Sequence[int]) -> Numbers:
    """Return those of some layers, in this order, which have these `stages`; None is a layer that is not there."""
    entropy, distance = (
        [None if layer is None else each[layer] for layer in layers]
        for each in (numbers.entropy, numbers.distance)
    )
    keys = [0 if layer is None else numbers.keys[layer] for layer in layers]
    return Numbers(entropy, distance, keys, stages, numbers.merges)


def mean_numbers(images: Sequence[Numbers]) -> Numbers:
    """Return the means over images."""
    entropies, distances = (
        [None if layer[0] is None else np.mean(layer, axis=0) for layer in zip(*each, strict=True)]
        for each in ([one.entropy for one in images], [one.distance for one in images])
    )
    merges = np.mean([one.merges for one in images], axis=0)
    return Numbers(entropies, distances, images[0].keys, images[0].stages, merges)


INCHES = 1.35
"""The longer side of a panel; less where there are many."""
LARGEST = 22.0
SHOWN = 0.995
"""The part of the weights of a picture that is within its color scale: one weight that outshines all is beyond it."""


@dataclass(frozen=True)
class Row:
    """A layer: its name, the patches that ask in the grids of its images, and its panels; None for an empty one."""

    name: str
    asking: Sequence[tuple[tuple[int, int], tuple[int, int] | None]]
    panels: Sequence[Panel | None]


def draw_grid(picture: Array, look: Look, query: Query, layers: Sequence[int], title: str) -> Figure:
    """Draw a row a layer: the mean of the heads, the rollout up to there where there is one, then each head."""
    rolled, heads = _have_rollouts([look], layers), max(look.layers[layer].heads for layer in layers)
    rows = []
    for layer in layers:
        mean, rollout, each = _panels(look.layers[layer], query)
        panels = [mean, *([rollout] * rolled), *each, *[None] * (heads - len(each))]
        rows.append(_row([look], layer, query, panels))
    columns = ["mean", *(["rollout"] * rolled), *(f"head {head}" for head in range(heads))]
    return _draw([picture], rows, columns, [picture] * len(columns), title)


def draw_beside(
    pictures: Sequence[Array], looks: Sequence[Look], query: Query, layers: Sequence[int], title: str
) -> Figure:
    """Draw a row a layer: the mean of the heads of the teacher and of the student, then the rollout of both.

    `pictures` and `looks` are the teacher's and the student's; both have an image where they see different ones.
    """
    names = ["mean", *(["rollout"] * _have_rollouts(looks, layers))]
    columns = [f"{name}\n{model}" for name in names for model in ("teacher", "student")]
    own = [1] if np.array_equal(pictures[0], pictures[1]) else [0, 1]
    rows = []
    for layer in layers:
        both = [_panels(look.layers[layer], query)[:2] for look in looks]
        panels = [each[kind] for kind in range(len(names)) for each in both]
        rows.append(_row([looks[place] for place in own], layer, query, panels, looks[0]))
    return _draw([pictures[place] for place in own], rows, columns, [*pictures] * len(names), title)


def layer_name(look: Look, layer: int, teacher: Look | None = None) -> str:
    """Return the name of a layer, with its stage if the model has several, and the teacher's beside it if another."""
    stages = {each.stage for each in look.layers}
    name = f"layer {layer}" + (f", stage {look.layers[layer].stage + 1}" if len(stages) > 1 else "")
    if teacher is None:
        return name
    theirs = teacher.layers[layer].number
    return name + (", alone" if theirs is None else f", teacher's {theirs}" if theirs != layer else "")


def _have_rollouts(looks: Sequence[Look], layers: Sequence[int]) -> bool:
    return any(look.layers[layer].rolled is not None for look in looks for layer in layers)


def _row(
    looks: Sequence[Look],
    layer: int,
    query: Query,
    panels: Sequence[Panel | None],
    teacher: Look | None = None,
) -> Row:
    layouts = [look.layers[layer].layout for look in looks]
    name = layer_name(looks[-1], layer, teacher).replace(", ", "\n")
    return Row(name, [(layout.grid, query.patch(layout)) for layout in layouts], panels)


def _panels(layer: LayerLook, query: Query) -> tuple[Panel | None, Panel | None, list[Panel]]:
    """Return the mean of the heads, the rollout, and each head; nothing without the token or without attention."""
    token, places = query.token(layer.layout), layer.places
    if token is None:
        return None, None, []
    asks = layer.layout.grid, query.patch(layer.layout)
    mean, rollout, heads = None, None, list[Panel]()
    if layer.maps is not None:
        rows = [layer.maps[:, token].mean(0), *layer.maps[:, token]]
        pictures = (places.picture(row, token).numpy() for row in rows)
        mean, *heads = (Panel(picture, places.extent, *asks, layer.signed) for picture in pictures)
    if layer.rolled is not None:
        picture = KeyPlaces(layer.layout.geometry).picture(layer.rolled[token], token).numpy()
        rollout = Panel(picture, (1.0, 1.0), *asks, rolled=True)
    return mean, rollout, heads


def shared_scale(panels: Sequence[Panel]) -> Scale:
    """Return one scale for all panels of a picture."""
    weights = np.concatenate([each.shown().ravel() for each in panels] or [np.zeros(1)])
    top, largest = float(np.quantile(weights, SHOWN)), float(weights.max())
    if largest <= 2 * top:
        top = largest
    return Scale(top or largest or 1, any(each.signed for each in panels), largest > top > 0)


def _draw(
    images: Sequence[Array],
    rows: Sequence[Row],
    columns: Sequence[str],
    pictures: Sequence[Array],
    title: str,
) -> Figure:
    """Draw the `images`, then the panels of each row over the `pictures` of their columns."""
    count = len(images) + len(columns)
    width, height = _panel_size(images[-1], count, len(rows))
    lines = title.count("\n") + 1
    figure = new_figure(max(width * count + 1.0, 4.8), max(height * len(rows) + 0.65 + 0.2 * lines, 2.6))
    grid = figure.subplots(len(rows), count, squeeze=False)
    scale = shared_scale([panel for row in rows for panel in row.panels if panel is not None])
    shown = ["image"] if len(images) == 1 else ["image\nteacher", "image\nstudent"]
    for axes, heading in zip(grid[0], [*shown, *columns], strict=True):
        axes.set_title(heading, color=INK["light"], fontsize=8)
    for axes, row in zip(grid, rows, strict=True):
        for each, image, asks in zip(axes, images, row.asking, strict=False):
            draw_picture(each, image, *asks)
        axes[0].set_ylabel(row.name, color=INK["light"], fontsize=8)
        for each, panel, picture in zip(axes[len(images) :], row.panels, pictures, strict=True):
            if panel is None:
                draw_nothing(each, picture)
            else:
                draw_panel(each, picture, panel, scale)
    figure.suptitle(title, color=INK["light"], fontsize=10)
    color_bar(figure, "attention weight", scale, ax=grid, fraction=0.025, pad=0.01, aspect=24, shrink=0.9)
    return figure


def _panel_size(picture: Array, columns: int, rows: int) -> tuple[float, float]:
    height, width = picture.shape[:2]
    across, down = INCHES * width / max(height, width), INCHES * height / max(height, width)
    shrink = min(1.0, LARGEST / (across * columns), LARGEST / (down * rows))
    return across * shrink, down * shrink + 0.06
