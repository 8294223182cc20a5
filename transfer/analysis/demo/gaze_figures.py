"""Attention maps over their images, one model beside the other, and the picture that sums the demo up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .curve_figures import COLOURS, FAINT, INK, Array, Theme


@dataclass(frozen=True)
class Gaze:
    """One image, the patch that asks, and where it looks in each model, as (rows, columns) maps."""

    image: Array
    query: tuple[int, int]
    layer: str
    maps: Mapping[str, Array]


def draw_gazes(gazes: Sequence[Gaze], titles: Mapping[str, str], theme: Theme) -> Figure:
    """A row for each image and layer: the image with its asking patch, then each model's attention over it.

    Within a row all maps share one scale, so that the same shade is the same attention.
    """
    figure = _figure((1.55 * (1 + len(titles)), 1.5 * len(gazes) + 0.45))
    _fill(figure.subplots(len(gazes), 1 + len(titles), squeeze=False), gazes, titles, theme)
    return figure


@dataclass(frozen=True)
class SummaryRow:
    """A method with one value a seed; a heading has neither."""

    label: str
    method: str | None = None
    values: Sequence[float] = ()

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def words(self) -> str:
        return self.label if self.method is None else f"{self.label}  {self.mean:.0f}"


def draw_summary(
    rows: Sequence[SummaryRow], gazes: Sequence[Gaze], titles: Mapping[str, str], theme: Theme
) -> Figure:
    """Accuracies on the left, attention maps on the right. A dot is a seed, an upright stroke the mean."""
    figure = _figure((11.6, max(1.3 * len(gazes), 0.42 * len(rows)) + 0.4))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(4.2, 7.4), wspace=0.03)[0]
    axes = left.subplots()
    for place, row in enumerate(reversed(rows)):
        if row.method is not None:
            colour = COLOURS[row.method]
            dots = {"color": colour, "markersize": 7, "alpha": 0.55, "markeredgewidth": 0}
            axes.plot(row.values, [place] * len(row.values), "o", **dots)
            axes.plot([row.mean], [place], "|", color=colour, markersize=18, markeredgewidth=3)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)), [row.words for row in reversed(rows)])
    for words, row in zip(axes.get_yticklabels(), reversed(rows), strict=True):
        words.set_fontweight("bold" if row.method is None else "normal")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT[theme])
    axes.tick_params(colors=INK[theme], length=0, labelsize=10)
    axes.grid(axis="x", color=FAINT[theme], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_title("top-1, %: a dot is a seed", color=INK[theme], fontsize=10)
    _fill(right.subplots(len(gazes), 1 + len(titles), squeeze=False), gazes, titles, theme)
    return figure


def _figure(size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _fill(grid: Any, gazes: Sequence[Gaze], titles: Mapping[str, str], theme: Theme) -> None:
    for row, gaze in zip(grid, gazes, strict=True):
        top = max(float(gaze.maps[name].max()) for name in titles)
        _show(row[0], gaze, None, top)
        row[0].set_ylabel(gaze.layer, color=INK[theme], fontsize=9)
        for axes, name in zip(row[1:], titles, strict=True):
            _show(axes, gaze, gaze.maps[name], top)
    for axes, title in zip(grid[0], ["image", *titles.values()], strict=True):
        axes.set_title(title, color=INK[theme], fontsize=10)


def _show(axes: Any, gaze: Gaze, heat: Array | None, top: float) -> None:
    """The image, the heat over it where there is one, and a square around the asking patch."""
    height, width = gaze.image.shape[:2]
    frame = (0, width, height, 0)
    axes.imshow(gaze.image, cmap="gray", extent=frame, interpolation="nearest")
    if heat is not None:
        axes.imshow(heat, cmap="magma", vmin=0, vmax=top, extent=frame, alpha=0.8, interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    rows, columns = next(iter(gaze.maps.values())).shape
    _mark(axes, gaze.query, height / rows, width / columns)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _mark(axes: Any, query: tuple[int, int], height: float, width: float) -> None:
    row, column = query
    x, y = column * width, row * height
    axes.plot(
        [x, x + width, x + width, x, x], [y, y, y + height, y + height, y], color="#4cc9f0", linewidth=1.8
    )
