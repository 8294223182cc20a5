"""The page of a search, made from the records in its folder: its front, its lineage, and what was refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure as Drawing

from ...checkpoints.atomic import write_text
from ...models.errors import ConfigError
from ...models.programs.program import mathml, parse_program, torch_code
from ...models.programs.program_checks import Check
from ..search.program_search import (
    USED,
    Evaluation,
    Search,
    controls,
    front,
    hypervolume,
    open_search,
    recorded_generations,
)
from .report.ink import BLUE, GRAY, GREEN, INK, ORANGE, Line, Theme, draw_lines, legend_beside, new_plots
from .report.rendering import Figure, render_page
from .report.tables import Table

# The ancestors of the programs of a front.


def ancestors(program: Evaluation, done: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the program and all that it comes from, the newest generation first."""
    by_text = _first_of_each(done)
    found: dict[str, Evaluation] = {}
    waiting = [program]
    while waiting:
        each = waiting.pop(0)
        if each.program not in found:
            found[each.program] = each
            waiting += [by_text[parent] for parent in each.parents]
    return sorted(found.values(), key=lambda one: (-one.generation, one.program))


def line_of_descent(program: Evaluation, done: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the program, its first parent, the first parent of that, and so on to a drawn program."""
    by_text = _first_of_each(done)
    line = [program]
    while line[-1].parents:
        line.append(by_text[line[-1].parents[0]])
    return line


def _first_of_each(done: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """Return the first evaluation of each program: its parents are older, also where it was drawn again later."""
    return {each.program: each for each in reversed(done)}


# The plots of a search: its front among all programs, the growth of the front, and where its programs come from.

Controls = Mapping[str, tuple[float, int]]
NAMED = ("softmax", "elu + 1", "values", "queries")
TOP = 1.6
"""The largest mismatch that is drawn; larger ones lie at the edge."""


def list_figures(done: Sequence[Evaluation], controls: Controls, softmax_cost: int) -> list[Figure]:
    """Return the figures of a search."""
    return [
        Figure(
            "search_front",
            "The front",
            "Mismatch with the teacher against cost in percent of softmax attention. Down and left is better; below "
            "the dotted line a program is better than a constant. Mismatches above 1.6 lie at the upper edge.",
            f"Scatter of {len(done)} programs: mismatch against cost, with a line along the front.",
            partial(_front, done, controls, softmax_cost),
        ),
        Figure(
            "search_growth",
            "Progress by generation",
            "The part of the area below mismatch 1 and the cost of softmax that the front dominates.",
            "A line: the hypervolume of the front after each generation.",
            partial(_growth, done, softmax_cost),
        ),
        Figure(
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


def _front(done: Sequence[Evaluation], controls: Controls, softmax_cost: int, theme: Theme) -> Drawing:
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


def _growth(done: Sequence[Evaluation], softmax_cost: int, theme: Theme) -> Drawing:
    last = max((each.generation for each in done), default=0)
    volumes = [
        hypervolume([each for each in done if each.generation <= generation], softmax_cost)
        for generation in range(last + 1)
    ]
    line = Line("front", range(1, last + 2), volumes, BLUE)
    limits = (0.0, 1.05 * max(volumes) or 1.0)
    return draw_lines({"": [line]}, theme, ("generation", "hypervolume"), size=(8.4, 3.0), limits=limits)


def _lineage(done: Sequence[Evaluation], theme: Theme) -> Drawing:
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


NAME = "report.html"
REASONS = ("condition", "first reason", "of the program")
LEGEND = (
    "In the formulas, c is the number of columns, φ(x) = elu(x) + 1, σ̄ = 1 − σ, and ⊙ is the product of entries. The "
    "code computes the same as the program."
)


def write_report(folder: Path, rankings: Sequence[Sequence[str]] = ()) -> Path:
    """Write `report.html` from the generations that are complete, with a table of rankings; return its path.

    Raises ConfigError: the folder has no search, or no generation of it is complete. WriteFailedError as `write_file`.
    """
    search = open_search(folder)
    done = recorded_generations(search)
    if not done:
        raise ConfigError(
            f"no generation of the search in {folder} is complete: run `graftvit programs search` first"
        )
    write_text(folder / NAME, render(search, done, rankings))
    return folder / NAME


def render(search: Search, done: Sequence[Evaluation], rankings: Sequence[Sequence[str]] = ()) -> str:
    """Return the page."""
    known = controls(search)
    shown = [[name, f"{error:g}", _format_share(search, cost)] for name, (error, cost) in known.items()]
    return render_page(
        "search_page.html",
        title="Search for attention programs",
        question=_question(search, done),
        answer=_answer(search, done, known["elu + 1"]),
        figures=list_figures(done, known, search.softmax_cost),
        controls=Table(["program", "mismatch", "cost"], shown),
        legend=LEGEND,
        programs=[_describe_program(search, each, done) for each in front(done)],
        refused=Table(["check", "refused", *REASONS], [_refused(check, done) for check in USED], REASONS),
        rankings=Table(rankings[0], rankings[1:]) if rankings else None,
    )


def _format_share(search: Search, cost: int) -> str:
    return f"{100 * cost / search.softmax_cost:.1f} %"


def _question(search: Search, done: Sequence[Evaluation]) -> str:
    settings = search.settings
    how = "drawn" if settings.at_random else "drawn, then evolved"
    return (
        f"Which formulas take over the attention of {settings.teacher}? {len(done):,} programs were {how} with seed "
        f"{settings.seed} and measured on {settings.images}, without training."
    )


def _answer(search: Search, done: Sequence[Evaluation], elu: tuple[float, int]) -> str:
    refused = sum(1 for each in done if each.refused)
    better = [each for each in front(done) if (each.mismatch or 0) < elu[0] and each.cost <= elu[1]]
    return (
        f"{refused:,} were refused by a check. The front has {len(front(done))} programs and a hypervolume of "
        f"{hypervolume(done, search.softmax_cost):.4f}. {len(better)} of them have a smaller mismatch than linear "
        f"attention with elu + 1 ({elu[0]:g}) and cost no more ({_format_share(search, elu[1])} of softmax)."
    )


def _describe_program(search: Search, each: Evaluation, done: Sequence[Evaluation]) -> dict[str, object]:
    program = parse_program(each.program)
    descent = [[one.program, one.generation + 1, f"{one.mismatch:g}"] for one in line_of_descent(each, done)]
    return {
        "text": each.program,
        "mismatch": _errors(each),
        "cost": _format_share(search, each.cost),
        "formula": Markup(mathml(program)),
        "products": program.products,
        "entries": program.entries,
        "code": torch_code(program),
        "descent": Table(["program", "generation", "mismatch"], descent),
    }


def _errors(each: Evaluation) -> str:
    """Return the mismatch, and that with each of several teachers."""
    several = f" ({', '.join(f'{error:g}' for error in each.errors)})" if len(each.errors) > 1 else ""
    return f"{each.mismatch:g}{several}"


def _refused(check: Check, done: Sequence[Evaluation]) -> list[str]:
    refused = [each for each in done if each.refused == check.name]
    first = (refused[0].reason, refused[0].program) if refused else ("-", "")
    return [check.name, str(len(refused)), check.condition, *first]
