"""How well proxies rank programs: compared with the accuracy that rows of the benchmark reached by training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy import stats

from ...models.errors import ConfigError, counted
from ...models.programs.program import parse_program
from ..search.program_search import PROXIES, Search
from ..search.zero_cost import SCORES
from .bench_rows import Row

FEWEST = 3
"""Programs below which a rank correlation says nothing."""
EARLY = "first epochs"
"""The proxy that is training itself: the accuracy of a row when it was first evaluated."""
HEAD = ("model", "data", "convolution", "programs", "proxy", "Kendall", "Spearman", "precision")


@dataclass(frozen=True)
class Ranking:
    """How the order of programs by a proxy agrees with their order by accuracy, in one model on one data set."""

    backbone: str
    data: str
    local: bool
    programs: int
    proxy: str
    kendall: float
    """Kendall's tau b: 1 for the same order, -1 for the opposite one; NaN if all scores are equal."""
    spearman: float
    precision: float
    """The part of the `top` programs by the proxy that are among the `top` by accuracy."""

    @property
    def cells(self) -> list[str]:
        """Return the columns of `HEAD`."""
        convolution = "with" if self.local else "without"
        numbers = (
            f"{x:.2f}" if math.isfinite(x) else "-" for x in (self.kendall, self.spearman, self.precision)
        )
        return [self.backbone, self.data, convolution, str(self.programs), self.proxy, *numbers]


def rank_proxies(search: Search, rows: Sequence[Row], top: int, short: Sequence[Row] = ()) -> list[Ranking]:
    """Compare each proxy with the accuracy of trained rows; accuracies of several seeds are averaged.

    The proxies are those of a search, on its recorded layers, the zero-cost scores, the cost, the first evaluation of
    each training, and the accuracies of `short` trainings by the name of their recipe. Each is compared on the programs
    that have it.

    Raises ConfigError: a model has fewer than 3 trained programs with a proxy, or no more than `top`.
    """
    trained = sorted((row for row in rows if row.top1 is not None), key=_group)
    if not trained:
        raise ConfigError("the rows have no trained program")
    proxies = _untrained_scores(search, sorted({row.program for row in trained}))
    return [
        ranking
        for key, group in itertools.groupby(trained, _group)
        for ranking in _compare(list(group), {**proxies, **_short_scores(key, short)}, top)
    ]


def compare_orders(
    scores: Sequence[float], accuracies: Sequence[float], top: int
) -> tuple[float, float, float]:
    """Return Kendall's tau b, Spearman's rho and the precision at `top`; higher scores and accuracies are better."""
    kendall, spearman = stats.kendalltau(scores, accuracies), stats.spearmanr(scores, accuracies)
    common = _best(scores, top) & _best(accuracies, top)
    return float(kendall.statistic), float(spearman.statistic), len(common) / top


def _group(row: Row) -> tuple[str, str, bool, str]:
    return row.backbone, row.data, row.local, row.settings


def _untrained_scores(search: Search, texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return for each proxy without training the scores of programs; higher is better."""
    programs = {text: parse_program(text) for text in texts}
    errors = {
        name: {text: -error(program, search.layers) for text, program in programs.items()}
        for name, error in PROXIES.items()
    }
    scores = {
        name: {text: score(program, search.layers) for text, program in programs.items()}
        for name, score in SCORES.items()
    }
    costs = {text: float(search.cost(program)) for text, program in programs.items()}
    return {**errors, **scores, "cost": costs}


def _short_scores(key: tuple[str, str, bool, str], short: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return by recipe the accuracies of short trainings with the model and data of a group."""
    alike = [row for row in short if row.top1 is not None and _group(row)[:3] == key[:3]]
    recipes = dict.fromkeys(row.recipe for row in alike)
    return {name: _by_program([row for row in alike if row.recipe == name], -1) for name in recipes}


def _compare(rows: Sequence[Row], proxies: Mapping[str, Mapping[str, float]], top: int) -> list[Ranking]:
    accuracies, known = _by_program(rows, -1), dict(proxies)
    if all(len(row.curve) > 1 for row in rows):
        known[EARLY] = _by_program(rows, 0)
    return [_ranking(rows[0], name, scores, accuracies, top) for name, scores in known.items()]


def _ranking(
    first: Row, proxy: str, scores: Mapping[str, float], accuracies: Mapping[str, float], top: int
) -> Ranking:
    programs = [text for text in accuracies if text in scores]
    if len(programs) < max(FEWEST, top + 1):
        raise ConfigError(
            f"{first.backbone} on {first.data} has {counted(len(programs), 'program')} with the proxy {proxy}: a "
            f"ranking needs {FEWEST} or more, and more than --top {top}"
        )
    orders = compare_orders([scores[text] for text in programs], [accuracies[text] for text in programs], top)
    return Ranking(first.backbone, first.data, first.local, len(programs), proxy, *orders)


def _by_program(rows: Sequence[Row], point: int) -> dict[str, float]:
    """Return the mean accuracy of each program at a point of the curve."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row.program, []).append(row.curve[point].top1)
    return {text: fmean(values) for text, values in sorted(found.items())}


def _best(scores: Sequence[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda place: -scores[place])[:count])
