"""Attention maps over their images, one model beside the other, and the picture that sums the demo up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from ..report.heat import draw_heat
from ..report.ink import INK, Array, Theme, new_figure, style_axes
from .curve_figures import COLORS


@dataclass(frozen=True)
class Gaze:
    """One image, the patch that asks, and where it looks in each model, as (rows, columns) maps."""

    image: Array
    query: tuple[int, int]
    layer: str
    maps: Mapping[str, Array]


def draw_gazes(gazes: Sequence[Gaze], titles: Mapping[str, str], theme: Theme) -> Figure:
    """Draw a row for each image and layer: the image with its asking patch, then each model's attention.

    Within a row all maps share one scale, so that the same shade is the same attention.
    """
    figure = new_figure(1.55 * (1 + len(titles)), 1.5 * len(gazes) + 0.45)
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
    """Draw accuracies on the left, attention maps on the right. A dot is a seed, an upright stroke the mean."""
    figure = new_figure(11.6, max(1.3 * len(gazes), 0.42 * len(rows)) + 0.4)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(4.2, 7.4), wspace=0.03)[0]
    axes = left.subplots()
    for place, row in enumerate(reversed(rows)):
        if row.method is not None:
            color = COLORS[row.method]
            dots = {"color": color, "markersize": 7, "alpha": 0.55, "markeredgewidth": 0}
            axes.plot(row.values, [place] * len(row.values), "o", **dots)
            axes.plot([row.mean], [place], "|", color=color, markersize=18, markeredgewidth=3)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)), [row.words for row in reversed(rows)])
    for words, row in zip(axes.get_yticklabels(), reversed(rows), strict=True):
        words.set_fontweight("bold" if row.method is None else "normal")
    style_axes(axes, theme, "x")
    axes.set_title("top-1, %: a dot is a seed", color=INK[theme], fontsize=10)
    _fill(right.subplots(len(gazes), 1 + len(titles), squeeze=False), gazes, titles, theme)
    return figure


def _fill(grid: Any, gazes: Sequence[Gaze], titles: Mapping[str, str], theme: Theme) -> None:
    for row, gaze in zip(grid, gazes, strict=True):
        shape = next(iter(gaze.maps.values())).shape
        top = max(float(gaze.maps[name].max()) for name in titles)
        for axes, heat in zip(row, [None, *(gaze.maps[name] for name in titles)], strict=True):
            draw_heat(axes, gaze.image, (shape[0], shape[1]), gaze.query, heat, top)
        row[0].set_ylabel(gaze.layer, color=INK[theme], fontsize=9)
    for axes, title in zip(grid[0], ["image", *titles.values()], strict=True):
        axes.set_title(title, color=INK[theme], fontsize=10)
