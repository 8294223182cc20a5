"""Pictures of deformable merges: the places of the image that merged tokens are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..merge_places import MergePlaces, trace
from ..report.heat import draw_heat
from ..report.ink import INK, Array, new_figure
from .map_figures import write_corner
from .queries import Query

PLACE = "#ff3b30"
INCHES = 2.4
"""The longer side of a panel."""
ROWS = ("all tokens", "one token", "one token,\nto stage 1")


def draw_merges(picture: Array, merges: Sequence[MergePlaces], query: Query, title: str) -> Figure:
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
    draw_heat(axes, picture, merge.merged, None)
    spacing = INCHES * 72 / max(merge.grid)
    _draw_places(axes, picture, merge.in_image().flatten(0, 2), min(3.0, 0.4 * spacing))
    write_corner(axes, f"{merge.shift().mean():.2g} px")


def _draw_token(
    axes: Any, picture: Array, merge: MergePlaces, token: tuple[int, int] | None, places: Tensor | None
) -> None:
    """Draw the places of a token, and the frame of an ordinary merge; nothing where there is no token."""
    tall, wide = merge.token
    draw_heat(axes, picture, (1 / (2 * tall), 1 / (2 * wide)), token)
    if places is not None:
        _draw_places(axes, picture, places, 3.0)


def _draw_places(axes: Any, picture: Array, places_P2: Tensor, size: float) -> None:
    down, right = (places_P2 * torch.tensor(picture.shape[:2])).T.numpy()
    axes.plot(right, down, "s", color=PLACE, markersize=size, markeredgewidth=0)
