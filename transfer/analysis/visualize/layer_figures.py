"""Charts by layer: entropy and distance of every head, and how far a student is from its teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..report.ink import BLUE, FAINT, GREEN, INK, ORANGE, Array, Theme, new_plots

STUDENT, TEACHER, BETWEEN = ORANGE, BLUE, GREEN


@dataclass(frozen=True)
class Numbers:
    """By layer, those of each head (H), means over images; None for a layer without attention."""

    entropy: Sequence[Array | None]
    distance: Sequence[Array | None]
    keys: Sequence[int]
    """The number of keys of each query, from which the largest entropy follows."""
    stages: Sequence[int]
    merges: Array
    """By deformable merge: the mean shift of a place in pixels, and the share of places outside of the image."""


@dataclass(frozen=True)
class MapDistance:
    """By layer: Jensen-Shannon divergence of the maps in nats, debiased linear CKA of the patch tokens.

    The divergence is None where a block has no attention.
    """

    js: Sequence[float | None]
    cka: Sequence[float | None]
    cka_random: Sequence[float | None]
    """Of a model of the teacher's architecture with random weights."""


def draw_layers(models: dict[str, Numbers], between: MapDistance | None, theme: Theme) -> Figure:
    """Draw entropy and mean distance, a dot a head and a line their mean; with a teacher, JS and CKA too."""
    rows = 1 if between is None else 2
    figure, grid = new_plots(theme, (9.6, 3.0 * rows), rows, 2, grid="y")
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    entropy, distance = grid[:2]
    for name, numbers in models.items():
        _heads(entropy, numbers.entropy, name)
        _heads(distance, numbers.distance, name)
    _axes(entropy, "entropy of a row, nats", theme)
    _axes(distance, "mean distance, patches", theme)
    _ceiling(entropy, list(models.values()), theme)
    if between is not None:
        _line(grid[2], between.js)
        _line(grid[3], between.cka)
        random = _line(grid[3], between.cka_random)
        random.set(color=INK[theme], linestyle=(0, (4, 4)), linewidth=1, marker="")
        random.set_label("random weights")
        _axes(grid[2], "JS divergence from the teacher, nats", theme)
        _axes(grid[3], "linear CKA (debiased) with the teacher", theme)
        least = min((value for value in (*between.cka, *between.cka_random) if value is not None), default=0)
        grid[3].set_ylim(min(least * 1.1, 0), 1.04)
        grid[3].legend(frameon=False, fontsize=8, labelcolor=INK[theme], loc="lower left")
    for axes in grid:
        _stages(axes, models["student"].stages, theme)
    if len(models) > 1:
        entropy.legend(frameon=False, fontsize=8, labelcolor=INK[theme], loc="lower right")
    return figure


def _heads(axes: Any, values: Sequence[Array | None], name: str) -> None:
    color = TEACHER if name == "teacher" else STUDENT
    nudge = {"teacher": -0.09, "student": 0.09}.get(name, 0.0)
    dots = [
        (layer + nudge, head) for layer, heads in enumerate(values) if heads is not None for head in heads
    ]
    axes.plot(*zip(*dots, strict=True), "o", color=color, markersize=4, alpha=0.45, markeredgewidth=0)
    means = [np.nan if heads is None else heads.mean() for heads in values]
    axes.plot(np.arange(len(values)) + nudge, means, color=color, linewidth=2, label=name)


def _line(axes: Any, values: Sequence[float | None]) -> Any:
    shown = [np.nan if value is None else value for value in values]
    return axes.plot(np.arange(len(shown)), shown, color=BETWEEN, linewidth=2, marker="o", markersize=5)[0]


def _stages(axes: Any, stages: Sequence[int], theme: Theme) -> None:
    """Draw a line between stages, and their numbers."""
    starts = [layer for layer, stage in enumerate(stages) if layer == 0 or stage != stages[layer - 1]]
    for start in starts if len(starts) > 1 else []:
        if start:
            axes.axvline(start - 0.5, color=FAINT[theme], linewidth=0.8)
        axes.annotate(
            f"stage {stages[start] + 1}", (start - 0.1, 0.02), xycoords=("data", "axes fraction"), fontsize=7,
            color=INK[theme],
        )  # fmt: skip


def _ceiling(axes: Any, models: Sequence[Numbers], theme: Theme) -> None:
    """Draw the entropy of even attention, the maximum, over as many keys as a layer has."""
    keys = [max(layer) for layer in zip(*(numbers.keys for numbers in models), strict=True)]
    tops = [math.log(count) if count else np.nan for count in keys]
    lines = np.arange(len(keys))
    ends, least = np.array([lines - 0.5, lines + 0.5]), next(top for top in tops if top == top)
    axes.plot(ends, [tops, tops], color=INK[theme], linewidth=0.8, linestyle=(0, (4, 4)))
    named = f"even over {max(keys)} tokens" if len({*keys} - {0}) == 1 else "even over all keys of the layer"
    axes.annotate(
        named, (0.01, least), xycoords=("axes fraction", "data"), va="bottom", color=INK[theme], fontsize=8
    )
    axes.set_ylim(0, np.nanmax(tops) * 1.12)


def _axes(axes: Any, title: str, theme: Theme) -> None:
    axes.set_title(title, color=INK[theme], fontsize=10, loc="left")
    axes.set_xlabel("layer", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.04)  # a dot at the top is shown whole
