"""The plots of a search: its front among all programs, the growth of the front, and where its programs come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from ...search.evolution import Evaluation, front, hypervolume
from ..report.ink import BLUE, GRAY, GREEN, INK, ORANGE, Theme, legend_beside, new_plots
from ..report.pages import Plot
from .search_lineage import ancestors

Controls = Mapping[str, tuple[float, int]]
NAMED = ("softmax", "elu + 1", "values", "queries")
TOP = 1.6
"""The largest mismatch that is drawn; larger ones lie at the edge."""


def plots_of(done: Sequence[Evaluation], controls: Controls, softmax_cost: int) -> list[Plot]:
    """Return the plots of a search."""
    return [
        Plot(
            "search_front",
            "The front",
            "Mismatch with the teacher against cost in percent of softmax attention. Down and left is better; below "
            "the dotted line a program is better than a constant. Mismatches above 1.6 lie at the upper edge.",
            f"Scatter of {len(done)} programs: mismatch against cost, with a line along the front.",
            partial(_front, done, controls, softmax_cost),
        ),
        Plot(
            "search_growth",
            "Progress by generation",
            "The part of the area below mismatch 1 and the cost of softmax that the front dominates.",
            "A line: the hypervolume of the front after each generation.",
            partial(_growth, done, softmax_cost),
        ),
        Plot(
            "search_lineage",
            "Where the front comes from",
            "All ancestors of the front, by generation and mismatch. A line joins a program to its parent.",
            "Programs by generation and mismatch, joined to their parents.",
            partial(_lineage, done),
        ),
    ]


def _percent(cost: int, softmax_cost: int) -> float:
    return max(0.01, 100 * cost / softmax_cost)


def _height(mismatch: float | None) -> float:
    return TOP if mismatch is None else min(mismatch, TOP)


def _front(done: Sequence[Evaluation], controls: Controls, softmax_cost: int, theme: Theme) -> Figure:
    figure, (axes,) = new_plots(theme, (8.4, 4.8))
    measured = [each for each in done if each.mismatch is not None]
    for programs, color, size in ((measured, GRAY, 2.5), (front(done), BLUE, 6)):
        x = [_percent(each.cost, softmax_cost) for each in programs]
        y = [_height(each.mismatch) for each in programs]
        label = "front" if color == BLUE else "measured"
        axes.plot(x, y, "o", color=color, markersize=size, label=label, zorder=3 if color == BLUE else 2)
    best = [each for each in front(done) if _height(each.mismatch) < TOP]
    axes.step([_percent(each.cost, softmax_cost) for each in best], [_height(each.mismatch) for each in best],
              where="post", color=BLUE, linewidth=1.2)  # fmt: skip
    _draw_controls(axes, controls, softmax_cost, theme)
    axes.axhline(1, color=INK[theme], linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="cost, % of softmax attention", ylabel="mismatch", ylim=(0, TOP * 1.05))
    legend_beside(axes, theme)
    return figure


def _draw_controls(axes: Any, controls: Controls, softmax_cost: int, theme: Theme) -> None:
    named = [name for name in NAMED if name in controls]
    # The cheapest share a place: the label of the lowest of them goes below it.
    lowest = min(named, key=lambda name: controls[name][::-1], default="")
    for name, (mismatch, cost) in controls.items():
        x, y = _percent(cost, softmax_cost), _height(mismatch)
        known = name in NAMED
        label = {NAMED[0]: "for comparison", "attnzero_105": "AttnZero"}.get(name)
        axes.plot([x], [y], "D" if known else "x", color=ORANGE if known else GREEN, markersize=5, zorder=4,
                  label=label)  # fmt: skip
        if known:
            above = 8 if name != lowest else -12
            axes.annotate(name, (x, y), xytext=(0, above), textcoords="offset points", fontsize=8, ha="center",
                          color=INK[theme])  # fmt: skip


def _growth(done: Sequence[Evaluation], softmax_cost: int, theme: Theme) -> Figure:
    figure, (axes,) = new_plots(theme, (8.4, 3.0), grid="y")
    last = max((each.generation for each in done), default=0)
    volumes = [
        hypervolume([each for each in done if each.generation <= generation], softmax_cost)
        for generation in range(last + 1)
    ]
    axes.plot(range(1, last + 2), volumes, "-o", color=BLUE, markersize=4)
    axes.set(xlabel="generation", ylabel="hypervolume")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _lineage(done: Sequence[Evaluation], theme: Theme) -> Figure:
    figure, (axes,) = new_plots(theme, (8.4, 4.2))
    by_text = {each.program: each for each in done}
    best = front(done)
    found = {each.program: each for program in best for each in ancestors(program, done)}
    for each in found.values():
        for parent in (by_text[text] for text in each.parents):
            axes.plot([parent.generation + 1, each.generation + 1], [_height(parent.mismatch), _height(each.mismatch)],
                      "-", color=GRAY, linewidth=0.8, zorder=1)  # fmt: skip
    for programs, color, label in ((list(found.values()), GRAY, "ancestor"), (best, BLUE, "front")):
        axes.plot([each.generation + 1 for each in programs], [_height(each.mismatch) for each in programs], "o",
                  color=color, markersize=4 if color == GRAY else 6, label=label)  # fmt: skip
    axes.set(xlabel="generation", ylabel="mismatch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_beside(axes, theme)
    return figure
