"""The page of a search, made from the records in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ....checkpoints.atomic import write_text
from ....models.errors import ConfigError
from ....models.programs.program import mathml, parse_program, torch_code
from ...search.evolution import Evaluation, front, hypervolume
from ...search.program_search import USED, Search, controls, open_search, recorded_generations
from ..report import pages
from .search_lineage import line_of_descent
from .search_plots import plots_of

NAME = "report.html"
LEGEND = (
    "In the formulas, c is the number of columns, φ(x) = elu(x) + 1, σ̄ = 1 − σ, and ⊙ is the product of entries. The "
    "code computes the same as the program."
)


@dataclass(frozen=True)
class ShownProgram:
    """A program of the front, as the page shows it."""

    text: str
    mismatch: str
    cost: str
    formula: str
    products: str
    entries: str
    code: str
    descent: list[list[str]]


def write_report(folder: Path, rankings: Sequence[Sequence[str]] = ()) -> Path:
    """Write `report.html` from the generations that are complete, with a table of rankings; return its path.

    Raises ConfigError: the folder has no search, or no generation of it is complete. WriteFailedError as `write_file`.
    """
    search = open_search(folder)
    done = recorded_generations(search)
    if not done:
        raise ConfigError(f"no generation of the search in {folder} is complete: run `graftvit search` first")
    write_text(folder / NAME, render(search, done, rankings))
    return folder / NAME


def render(search: Search, done: Sequence[Evaluation], rankings: Sequence[Sequence[str]] = ()) -> str:
    """Return the page."""
    known = controls(search)
    return pages.render_page(
        "search/search_page.html",
        title="Search for attention programs",
        question=_question(search, done),
        answer=_answer(search, done, known["elu + 1"]),
        plots=plots_of(done, known, search.softmax_cost),
        controls=[[name, f"{error:g}", _percent(search, cost)] for name, (error, cost) in known.items()],
        legend=LEGEND,
        programs=[_shown(search, each, done) for each in front(done)],
        refused=_refused(done),
        rankings=rankings,
    )


def _percent(search: Search, cost: int) -> str:
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
        f"attention with elu + 1 ({elu[0]:g}) and cost no more ({_percent(search, elu[1])} of softmax)."
    )


def _shown(search: Search, each: Evaluation, done: Sequence[Evaluation]) -> ShownProgram:
    program = parse_program(each.program)
    return ShownProgram(
        each.program,
        _errors(each),
        _percent(search, each.cost),
        mathml(program),
        str(program.products),
        str(program.entries),
        torch_code(program),
        [[one.program, str(one.generation + 1), f"{one.mismatch:g}"] for one in line_of_descent(each, done)],
    )


def _errors(each: Evaluation) -> str:
    """Return the mismatch, and that with each of several teachers."""
    several = f" ({', '.join(f'{error:g}' for error in each.errors)})" if len(each.errors) > 1 else ""
    return f"{each.mismatch:g}{several}"


def _refused(done: Sequence[Evaluation]) -> list[list[str]]:
    rows = []
    for check in USED:
        refused = [each for each in done if each.refused == check.name]
        first = (refused[0].reason, refused[0].program) if refused else ("-", "")
        rows.append([check.name, str(len(refused)), check.condition, *first])
    return rows
