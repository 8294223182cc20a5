"""A heat map over its image: where one patch looks."""

from __future__ import annotations

from typing import Any

from .ink import Array

HEAT, SIGNED = "magma", "RdBu_r"
QUERY = "#39d0ff"


def draw_heat(
    axes: Any,
    picture: Array,
    grid: tuple[float, float],
    query: tuple[int, int] | None,
    heat: Array | None = None,
    top: float = 1.0,
    *,
    signed: bool = False,
    covers: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Draw the image, the heat (rows, columns) over it, and a frame around the patch that asks.

    `heat` covers these parts of the height and width, from the upper left corner. `top` has the strongest color.
    `signed` heat has two colors, and none at zero.
    """
    height, width = picture.shape[:2]
    axes.imshow(picture, cmap="gray", extent=(0, width, height, 0), interpolation="nearest")
    if heat is not None:
        colors = SIGNED if signed else HEAT
        place = (0, width * covers[1], height * covers[0], 0)
        limits = {"vmin": -top if signed else 0, "vmax": top}
        axes.imshow(heat, cmap=colors, alpha=0.8, extent=place, interpolation="nearest", **limits)
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    if query is not None:
        x, y = query[1] * width / grid[1], query[0] * height / grid[0]
        right, bottom = x + width / grid[1], y + height / grid[0]
        axes.plot([x, right, right, x, x], [y, y, bottom, bottom, y], color=QUERY, linewidth=1.5)
    axes.set(xlim=(0, width), ylim=(height, 0))
