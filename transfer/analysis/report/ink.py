"""The style of every plot: ink for light and for dark pages, quiet axes; and a figure as a PNG file."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

from ....checkpoints.atomic import write_file

Theme = Literal["light", "dark"]
Array = NDArray[Any]
INK: dict[Theme, str] = {"light": "#24292f", "dark": "#dfe3e8"}
FAINT: dict[Theme, str] = {"light": "#d4d9df", "dark": "#3a414b"}
GRAY, BLUE, ORANGE, GREEN, PURPLE = "#8b949e", "#3b82d6", "#e08a1e", "#12a07a", "#9a63d8"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#d0503f", "#2aa3b8", "#b8a019", "#c65a9b", "#6b8f3c", "#7a6a58")
DASHES = ("-", "--", ":")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that arranges its plots itself."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_plots(
    theme: Theme,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    *,
    grid: str = "both",
    **options: Any,
) -> tuple[Figure, list[Any]]:
    """Return a figure of `size` and its plots, row by row, in the style of the theme."""
    figure = new_figure(*size)
    plots = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in plots:
        style_axes(axes, theme, grid)
    return figure, plots


def style_axes(axes: Any, theme: Theme, grid: str = "both") -> None:
    """Give a plot the theme's ink, a faint grid along "x", "y" or "both", and no frame but its bottom."""
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT[theme])
    axes.grid(axis=grid, color=FAINT[theme], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK[theme], length=0, labelsize=9)
    axes.xaxis.label.set_color(INK[theme])
    axes.yaxis.label.set_color(INK[theme])


def color_of(place: int) -> str:
    """Return the color of the line at `place`; after ten they repeat, with other dashes."""
    return COLORS[place % len(COLORS)]


def dashes_of(place: int) -> str:
    """Return the dashes that tell apart two lines of one color."""
    return DASHES[place // len(COLORS) % len(DASHES)]


def legend_beside(axes: Any, theme: Theme) -> None:
    """Put the legend to the right of the plot."""
    axes.legend(
        fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=INK[theme]
    )


@dataclass(frozen=True)
class Line:
    """A line of a chart with its points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dashes: str = "-"
    """Of the line between the points; empty for none."""
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """The lower and the upper edge of an area around the line."""
    ring: float | None = None
    """Where on the line a ring is."""


def draw_lines(
    panels: Mapping[str, Sequence[Line]],
    theme: Theme,
    names: tuple[str, str],
    *,
    size: tuple[float, float] = (8.4, 4.2),
    stacked: bool = False,
    log: bool = False,
    ticks: bool = True,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw a plot for each heading, with the names of both axes and a legend.

    Plots that are `stacked` have a legend each, others lie side by side on one scale of y, with the legend of the last.
    `ticks` are at the points of the lines.
    """
    count = max(1, len(panels))
    layout: dict[str, Any] = {"rows": count} if stacked else {"columns": count, "sharey": True}
    figure, plots = new_plots(theme, size, **layout)
    for axes, (heading, lines) in zip(plots, panels.items(), strict=False):
        for line in lines:
            _draw_line(axes, line, log)
        if log:
            axes.set(xscale="log", yscale="log")
            axes.minorticks_off()
            _name_ticks(axes.yaxis)
        if ticks:
            places = sorted({x for line in lines for x in line.x})
            axes.set_xticks(places, [f"{place:,}" for place in places])
        axes.set_title(heading, color=INK[theme], fontsize=10)
        axes.set_xlabel(names[0])
        if stacked or axes is plots[-1]:
            legend_beside(axes, theme)
        if stacked or axes is plots[0]:
            axes.set_ylabel(names[1])
    if limits is not None:
        plots[0].set_ylim(*limits)
    return figure


def _name_ticks(axis: Any) -> None:
    """Put several named ticks on a logarithmic axis, also on one of less than a decade."""
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    axis.set_major_locator(
        LogLocator(subs=(1,) if decades > 3 else (1, 2, 5)) if decades > 1 else MaxNLocator(5)
    )
    axis.set_major_formatter("{x:g}")


def _draw_line(axes: Any, line: Line, log: bool) -> None:
    axes.plot(
        line.x,
        line.y,
        linestyle=line.dashes,
        color=line.color,
        marker="o",
        markersize=3,
        linewidth=1.4,
        label=line.label,
    )
    if line.band is not None:
        axes.fill_between(line.x, *line.band, color=line.color, alpha=0.15, linewidth=0)
    if line.ring is not None:
        at, x, y = (np.log(each) if log else np.asarray(each) for each in (line.ring, line.x, line.y))
        place = float(np.interp(at, x, y))
        axes.plot(
            [line.ring], [np.exp(place) if log else place], "o", mfc="none", mec=line.color, markersize=11
        )


def spread(places: Sequence[float], gap: float, low: float | None = None, high: float | None = None) -> Array:
    """Return the least-squares places, ascending as the given ones, that are at least `gap` apart."""
    from scipy.optimize import isotonic_regression  # here: it takes long, and few figures need it

    room = gap * np.arange(len(places))
    top = None if high is None else max(high - room[-1], 1e-6)
    return np.clip(isotonic_regression(np.asarray(places) - room).x, low, top) + room


def to_png(figure: Figure, *, ground: str = "none", dots_per_inch: int = 150) -> bytes:
    """Return the figure as a PNG file, on a transparent `ground` or on a color."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dots_per_inch, facecolor=ground)
    return file.getvalue()


# Arrays as an .npz file.


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays by name to an .npz file, whole or not at all. Raises WriteFailedError as `write_file`."""
    save: Callable[..., None] = np.savez
    size = sum(array.nbytes for array in arrays.values())
    write_file(path, lambda temporary: save(temporary, **arrays), size=size)


# A heat map over its image: where one patch looks.

HEAT, SIGNED = "magma", "RdBu_r"
QUERY = "#39d0ff"
SIGNED_LABEL = "the same, where weights may be negative"


@dataclass(frozen=True)
class Panel:
    """What one query takes from each key of a layer."""

    heat: Array
    """The weights by rows and columns of the keys; empty for a layer without attention."""
    extent: tuple[float, float]
    """The parts of the image's height and width that the keys cover."""
    grid: tuple[int, int]
    """Rows and columns of the layer's tokens."""
    asking: tuple[int, int] | None
    """The patch that asks; None for a prefix token."""
    signed: bool = False
    """Whether weights may be negative."""
    rolled: bool = False
    """Whether it is a rollout, whose color scale does not follow the patch that asks: its residual outshines all."""

    def shown(self) -> Array:
        """Return how large each weight is; of a rollout without the patch that asks."""
        weights: Array = np.abs(self.heat)
        if self.rolled and self.asking is not None:
            weights[self.asking] = 0.0
        return weights

    @property
    def top(self) -> float:
        """The largest weight."""
        return float(self.shown().max(initial=0.0))


@dataclass(frozen=True)
class Scale:
    """The colors of weights up to the `top` of them; of weights that may be negative, two on each side of zero."""

    top: float
    signed: bool = False
    clipped: bool = False
    """Whether some weight is larger."""

    @property
    def norm(self) -> Normalize:
        """Return the place of a weight among the colors: by its square root, which shows weak maps beside strong ones;
        linear where weights may be negative."""
        return Normalize(-self.top, self.top) if self.signed else PowerNorm(0.5, 0, self.top, clip=True)

    @property
    def colors(self) -> str:
        return SIGNED if self.signed else HEAT


def draw_panel(axes: Any, picture: Array, panel: Panel, scale: Scale) -> None:
    """Draw a panel over its image; its own largest weight is in the corner."""
    draw_picture(axes, picture, panel.grid, panel.asking)
    height, width = picture.shape[:2]
    place = (0, width * panel.extent[1], height * panel.extent[0], 0)
    axes.imshow(
        panel.heat, cmap=scale.colors, alpha=0.75, extent=place, interpolation="nearest", norm=scale.norm
    )
    write_corner(axes, f"{panel.top:.2g}")


def draw_picture(axes: Any, picture: Array, grid: tuple[float, float], query: tuple[int, int] | None) -> None:
    """Draw an image, and a frame around the patch of the grid that asks."""
    height, width = picture.shape[:2]
    axes.imshow(picture, cmap="gray", extent=(0, width, height, 0), interpolation="nearest")
    clear_axes(axes)
    if query is not None:
        x, y = query[1] * width / grid[1], query[0] * height / grid[0]
        right, bottom = x + width / grid[1], y + height / grid[0]
        axes.plot([x, right, right, x, x], [y, y, bottom, bottom, y], color=QUERY, linewidth=1.5)
    axes.set(xlim=(0, width), ylim=(height, 0))


def draw_nothing(axes: Any, picture: Array) -> None:
    """Leave the place of an image empty."""
    clear_axes(axes)
    height, width = picture.shape[:2]
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")


def clear_axes(axes: Any) -> None:
    """Leave nothing of a plot but its title, its label and what is drawn on it."""
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)


def write_corner(axes: Any, text: str) -> None:
    """Write a number into the lower right corner of a panel."""
    label = {"boxstyle": "square,pad=0.15", "facecolor": "#000000b0", "linewidth": 0}
    corner = {"ha": "right", "va": "bottom", "transform": axes.transAxes}
    axes.text(0.985, 0.02, text, fontsize=5.5, color="white", bbox=label, **corner)


def color_bar(figure: Figure, label: str, scale: Scale, **place: Any) -> None:
    """Draw the colors of a scale with its numbers; `place` is as of matplotlib's `colorbar`."""
    beyond = "neither" if not scale.clipped else "both" if scale.signed else "max"
    bar = figure.colorbar(ScalarMappable(scale.norm, scale.colors), extend=beyond, **place)
    bar.set_label(label, color=INK["light"], fontsize=7)
    ticks = [-scale.top, 0, scale.top] if scale.signed else [0, scale.top / 10, scale.top / 2, scale.top]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.ax.tick_params(colors=INK["light"], labelsize=7, length=2)
    bar.outline.set_visible(False)
