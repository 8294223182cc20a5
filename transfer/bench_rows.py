"""Rows of the benchmark: what one training of a model with a program measured, as JSON Lines or Parquet."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter
from scipy import stats

from ..checkpoints.atomic import write_file, write_text
from ..checkpoints.files import open_regular, parse_record, read_lines
from ..models.errors import ConfigError, counted, install_command
from ..models.programs.program import parse_program
from .cells import Ending, Whole
from .search.matching import SCORES
from .search.program_search import PROXIES, Search

MOST_THREADS = 10_000
GROUP = 64
"""Rows of a Parquet file that are unpacked at a time: a small file can say that each of them is large."""
Status = Literal["trained", "refused", "failed"]
NEEDED = ("settings", "program", "hash", "backbone", "data", "seed", "local", "status", "curve")
PARQUET = ".parquet"
TOLERANCE = 30.0
"""Points of top-1 in the last epoch by which another machine, or another torch, may differ.

Programs with logarithms, signs or large powers carry a rounding on: their short trainings are not stable.
"""


class Point(NamedTuple):
    """The score on the validation split after an epoch (from 1)."""

    epoch: Whole
    top1: Annotated[float, Field(ge=0, le=100)]
    loss: float


@dataclass(frozen=True)
class Row(Ending):
    """One training. `settings` is the digest of all that its numbers depend on, but for program and seed."""

    program: str = ""
    """The canonical text."""
    hash: str = ""
    name: str = ""
    """The name of a control, of a program that AttnZero found, or of a kit; empty for others."""
    backbone: str = ""
    data: str = ""
    seed: Whole = 0
    local: bool = True
    """Addition of a depthwise convolution of the values."""
    recipe: str = ""
    status: Status = "trained"
    reason: str = ""
    """Why the program was refused, or why the training failed."""
    curve: tuple[Point, ...] = ()
    parameters: Whole | None = None
    macs: Whole | None = None
    """Multiply-adds of one image."""
    latency: Annotated[float, Field(ge=0)] | None = None
    """Milliseconds of an image in a batch of 32."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, int, bool, str]:
        """Return what only one row has."""
        return self.data, self.backbone, self.hash, self.seed, self.local, self.settings

    @property
    def threads(self) -> int:
        """Return the threads of the training. Raises ValueError: the environment names no such number."""
        threads = int(self.environment.get("threads", "1"))
        if not 1 <= threads <= MOST_THREADS:
            raise ValueError(f"threads are {threads}")
        return threads

    @property
    def top1(self) -> float | None:
        """Return the accuracy of the last epoch, which is not chosen by the validation split; None if not trained."""
        return self.curve[-1].top1 if self.status == "trained" and self.curve else None


_ROW = TypeAdapter(Row)


def disagreement(old: Row, new: Row) -> str:
    """Return what differs between two rows of one key; empty if they agree.

    In the same environment all numbers but the latency are equal. In another one the last top-1 is within `TOLERANCE`,
    and a training whose loss overflows in one may end in the other.
    """
    same = old.environment == new.environment
    if old.status != new.status and (same or "refused" in (old.status, new.status)):
        return f"it was {old.status} and is now {new.status}"
    for what in ("parameters", "macs"):
        numbers = getattr(old, what), getattr(new, what)
        if None not in numbers and numbers[0] != numbers[1]:
            return f"{what} {numbers[0]} and {numbers[1]}"
    if same:
        if old.reason != new.reason:
            return f"{old.reason!r} and {new.reason!r}"
        return "" if old.curve == new.curve else f"curves {_curve(old)} and {_curve(new)}"
    if old.top1 is not None and new.top1 is not None and abs(old.top1 - new.top1) > TOLERANCE:
        return f"top-1 {old.top1:.2f} and {new.top1:.2f}, more than {TOLERANCE:g} points apart"
    return ""


def _curve(row: Row) -> str:
    return ", ".join(f"{point.top1:.4f}" for point in row.curve)


def merge_rows(groups: Iterable[Sequence[Row]]) -> list[Row]:
    """Return all rows in order of their keys, each once: the first of several that agree.

    Raises ConfigError: two rows of one key do not agree.
    """
    found: dict[tuple[object, ...], Row] = {}
    for row in (row for rows in groups for row in rows):
        first = found.setdefault(row.key, row)
        why = disagreement(first, row)
        if why:
            raise ConfigError(
                f"two rows of {describe(row)} do not agree: {why}; leave one out, or run it again with "
                "`graftvit programs bench verify`"
            )
    return [found[key] for key in sorted(found)]


def describe(row: Row) -> str:
    """Return a row in words: program, backbone, data, seed, and whether it has the convolution."""
    convolution = "with" if row.local else "without"
    return (
        f"{row.name or row.program} ({row.backbone}, {row.data}, seed {row.seed}, {convolution} convolution)"
    )


def best_first(rows: Iterable[Row]) -> list[Row]:
    """Return rows by falling accuracy; those without one are the last."""
    return sorted(rows, key=lambda row: (row.top1 is None, -(row.top1 or 0.0), row.key))


def row_text(row: Row) -> str:
    """Return a row as a line of JSON."""
    return json.dumps(_plain(row), ensure_ascii=False) + "\n"


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write rows in order of their keys, as Parquet if the name ends so, else as JSON Lines; whole or not at all.

    Raises ConfigError: Parquet needs pyarrow. WriteFailedError as `write_file`.
    """
    ordered = sorted(rows, key=lambda row: row.key)
    if path.suffix != PARQUET:
        write_text(path, "".join(map(row_text, ordered)))
        return
    table = _arrow(path).Table.from_pylist([_plain(row) for row in ordered])
    parquet = importlib.import_module("pyarrow.parquet")
    write_file(path, lambda temporary: parquet.write_table(table, temporary), size=table.nbytes)


def _plain(row: Row) -> dict[str, Any]:
    found = dataclasses.asdict(row)
    del found["error"]
    return {**found, "curve": [point._asdict() for point in row.curve]}


def read_rows(path: Path, label: str | None = None) -> list[Row]:
    """Return the rows of a file, which errors call `label`, or by its name.

    Raises ConfigError: it is not there, or a row is damaged, which is named.
    """
    if path.suffix == PARQUET:
        return [_row(each, f"{path}, row {n}") for n, each in enumerate(_parquet(path), 1)]
    lines = read_lines(path, refusal=ConfigError)
    return [
        _row(parse_record(line), f"{label or path}, line {number}") for number, line in enumerate(lines, 1)
    ]


def _row(content: Any, label: str) -> Row:
    if content is None:
        raise ConfigError(f"{label} is no row of a benchmark: it is cut or damaged")
    try:
        lacking = [name for name in NEEDED if name not in content]
        if lacking:
            raise ValueError(f"it has no {lacking[0]}")
        row = _ROW.validate_python(content)
        row.threads  # noqa: B018 - checks it
        return row
    except ValueError as error:  # and pydantic's ValidationError
        raise ConfigError(f"{label} is no row of a benchmark: {error}") from error


def _parquet(path: Path) -> Iterator[Any]:
    """Yield the rows of a file. Raises ConfigError: it is damaged, or pyarrow is not installed."""
    arrow = _arrow(path)
    parquet = importlib.import_module("pyarrow.parquet")
    columns = [each.name for each in dataclasses.fields(Row)]
    with open_regular(path, refusal=ConfigError) as file:
        try:
            opened = parquet.ParquetFile(file)
            for batch in opened.iter_batches(GROUP, columns=columns, use_threads=False):
                yield from batch.to_pylist()
        except (OSError, ValueError, MemoryError, arrow.ArrowException) as error:
            raise ConfigError(f"{path} cannot be read as Parquet: {error}") from error


def _arrow(path: Path) -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ConfigError(
            f"{path}: Parquet needs pyarrow; {install_command('parquet')}, or give a name that ends in .jsonl"
        ) from error


# How well proxies rank programs: compared with the accuracy that rows of the benchmark reached by training.

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
