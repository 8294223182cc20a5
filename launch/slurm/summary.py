"""Summarize a sweep: one row for each setting, with mean and standard deviation over its seeds, as tables and a plot.

Only the run folders of the cells are read.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from ...checkpoints.atomic import write_bytes
from ...checkpoints.files import read_records
from ...checkpoints.markdown import plain
from ...models.errors import ConfigError, GraftError, counted
from ...transfer.analysis.report.ink import legend_beside, new_plots, to_png
from ...transfer.analysis.report.tables import Table, tabulate
from ...transfer.metrics.intervals import Interval, accuracy_interval
from .folder import JobFolder
from .jobs import current_stage, read_progress
from .sweep import SWEEP_FILE, Cell, load_sweep

State = Literal["done", "failed", "unfinished", "not begun"]
ACCURACIES = ("test_top1", "test_ema_top1")
LOSS = "train_loss"
SAMPLES = "test_samples"


@dataclass(frozen=True)
class CellResult:
    """The result of a cell according to its run folder."""

    cell: Cell
    state: State
    why: str = ""
    """How it failed, or how far it is."""
    numbers: dict[str, float] = field(default_factory=dict)
    """The results of a finished cell: test_top1 and test_ema_top1 in percent, last and best_; the last train_loss."""


def read_cell(cell: Cell) -> CellResult:
    """Read the result of a cell.

    A cell is done if its last epoch is in the log and its student is written, failed if its last attempt recorded that,
    and otherwise unfinished. For a recipe with stages, the current stage counts.
    """
    run, attempts = current_stage(cell.folder), JobFolder(cell.folder).attempts()
    done, epochs = read_progress(cell.folder), _epochs(run / "log.jsonl")
    over = not attempts or attempts[-1].outcome is not None  # and is not trained for more epochs
    whole = bool(done.total_steps and epochs and epochs[-1]["step"] >= done.total_steps)
    if over and whole and (cell.folder / "student").is_dir():
        return CellResult(cell, "done", numbers=_numbers(epochs))
    if attempts and attempts[-1].outcome == "failed":
        return CellResult(cell, "failed", _one_line(attempts[-1].why))
    if not attempts and not (run / "config.yaml").is_file():
        return CellResult(cell, "not begun")
    of = f" of {done.total_steps}" if done.total_steps else ""
    stage = f"stage {done.stage}, " if done.stage else ""
    return CellResult(cell, "unfinished", f"{stage}step {done.step}{of}")


def _epochs(path: Path) -> list[dict[str, Any]]:
    """Return the records at the end of an epoch; the others have no number of parameters."""
    try:
        return [record for record in read_records(path) if "n_parameters" in record]
    except GraftError:
        return []


def _numbers(epochs: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in ACCURACIES:
        values = [float(record[name]) for record in epochs if name in record]
        if values:
            found |= {name: values[-1], f"best_{name}": max(values)}
    if SAMPLES in epochs[-1]:
        found[SAMPLES] = float(epochs[-1][SAMPLES])
    if LOSS in epochs[-1]:
        found[LOSS] = float(epochs[-1][LOSS])
    return found


def _one_line(text: str, length: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


SEED = "seed"
NUMBERS = (*(f"{best}{name}" for name in ACCURACIES for best in ("", "best_")), LOSS)
NAME = "summary"


@dataclass(frozen=True)
class Measure:
    """One number of all finished seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """The deviation of the sample (n − 1); None for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """One setting of everything but the seed."""

    settings: dict[str, str]
    cells: tuple[CellResult, ...]

    @property
    def samples(self) -> int | None:
        """The test images of its cells; None where they are not known, or not the same."""
        counts = {each.numbers.get(SAMPLES) for each in self.cells if each.state == "done"}
        count = counts.pop() if len(counts) == 1 else None
        return None if count is None else int(count)

    def interval(self, name: str) -> Interval | None:
        """Return the 95 % interval of a mean accuracy, for the number of test images."""
        measure = self.measures.get(name)
        if measure is None or self.samples is None or name == LOSS:
            return None
        return accuracy_interval(measure.mean, self.samples)

    @property
    def done(self) -> int:
        return sum(cell.state == "done" for cell in self.cells)

    @property
    def asked(self) -> int:
        return len(self.cells)

    @property
    def measures(self) -> dict[str, Measure]:
        """The names in `NUMBERS` that the finished cells have."""
        done = [result.numbers for result in self.cells if result.state == "done"]
        values = {name: tuple(one[name] for one in done if name in one) for name in NUMBERS}
        return {name: Measure(found) for name, found in values.items() if found}


@dataclass(frozen=True)
class Summary:
    """All rows in the order of the sweep."""

    folder: Path
    keys: tuple[str, ...]
    """The swept settings, without the seed."""
    rows: tuple[Row, ...]

    @property
    def names(self) -> list[str]:
        """Return the numbers that any row has, in the order of `NUMBERS`."""
        return [name for name in NUMBERS if any(name in row.measures for row in self.rows)]

    @property
    def missing(self) -> list[CellResult]:
        """Return the unfinished cells."""
        return [result for row in self.rows for result in row.cells if result.state != "done"]


def summarize(folder: Path) -> Summary:
    """Return what the cells of the sweep in `folder` have measured so far.

    Raises ConfigError: no sweep was submitted to it; CheckpointError: its `sweep.json` is damaged.
    """
    sweep = load_sweep(folder)
    if sweep is None:
        raise ConfigError(
            f"{folder} is not a sweep, because it has no {SWEEP_FILE}: give the output_dir of `graftvit submit --sweep`"
        )
    rows: dict[tuple[tuple[str, str], ...], list[CellResult]] = {}
    for cell in sweep.cells:
        setting = tuple((key, value) for key, value in cell.settings.items() if key != SEED)
        rows.setdefault(setting, []).append(read_cell(cell))
    keys = tuple(axis.key for axis in sweep.axes if axis.key != SEED)
    return Summary(folder, keys, tuple(Row(dict(setting), tuple(found)) for setting, found in rows.items()))


def write_summary(summary: Summary) -> list[Path]:
    """Write `summary.csv` and `summary.md`, and `summary.png` when a cell is done, and return their paths.

    Raises WriteFailedError as `write_file`.
    """
    files = {".csv": to_csv(summary).encode(), ".md": to_markdown(summary).encode()}
    if summary.names:
        files[".png"] = to_png(draw(summary), ground="white")
    for suffix, content in files.items():
        write_bytes(summary.folder / f"{NAME}{suffix}", content)
    return [summary.folder / f"{NAME}{suffix}" for suffix in files]


def to_csv(summary: Summary) -> str:
    """Return a row for each setting; an empty field without a number, or without a deviation of a single value."""
    columns: dict[str, Callable[[Row], object]] = {key: partial(_setting, key) for key in summary.keys}
    columns |= {"done": lambda row: row.done, "asked": lambda row: row.asked}
    for name in summary.names:
        columns[f"{name}_mean"] = partial(_number_of, name, "mean")
        columns[f"{name}_std"] = partial(_number_of, name, "std")
    for name in (name for name in summary.names if name != LOSS):
        for place, end in enumerate(("low", "high")):
            columns[f"{name}_{end}"] = partial(_end, name, place)
    columns["test_images"] = lambda row: row.samples or None
    columns["not_done"] = lambda row: "; ".join(_state(each) for each in row.cells if each.state != "done")
    return tabulate(summary.rows, columns).to_csv()


def _setting(key: str, row: Row) -> str:
    return row.settings[key]


def _number_of(name: str, kind: str, row: Row) -> float | None:
    return getattr(row.measures.get(name), kind, None)


def _end(name: str, place: int, row: Row) -> float | None:
    interval = row.interval(name)
    return None if interval is None else interval[place]


def to_markdown(summary: Summary) -> str:
    """Return the table with mean ± standard deviation over seeds and intervals, and a line for each unfinished cell."""
    heads = [*(summary.keys or ["setting"]), "done", *(name.replace("_", " ") for name in summary.names)]
    lines = [
        [
            *([row.settings[key] for key in summary.keys] or ["as in the recipe"]),
            f"{row.done}/{row.asked}",
            *(shown(row.measures.get(name), name) + _between(row.interval(name)) for name in summary.names),
        ]
        for row in summary.rows
    ]
    parts = [Table(heads, lines, summary.keys).to_markdown()]
    counts = sorted({row.samples for row in summary.rows if row.samples})
    if counts:
        images = " or ".join(f"{count:,}" for count in counts)
        parts.append(f"[low, high] is the 95 % interval (Wilson's) of an accuracy on {images} test images.")
    if summary.missing:
        left = "\n".join(f"- {plain(_state(result))}" for result in summary.missing)
        parts.append(f"{counted(len(summary.missing), 'cell')} not done:\n\n{left}")
    return "\n\n".join(parts) + "\n"


def shown(measure: Measure | None, name: str) -> str:
    """Return `81.20 ± 0.35`: two digits after the point of an accuracy, four of a loss; empty without a number."""
    if measure is None:
        return ""
    digits = 4 if name == LOSS else 2
    std = "" if measure.std is None else f" ± {measure.std:.{digits}f}"
    return f"{measure.mean:.{digits}f}{std}"


def _between(interval: Interval | None) -> str:
    return "" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]"


def _state(result: CellResult) -> str:
    return f"{result.cell.name} {result.state}" + (f": {result.why}" if result.why else "")


# Plot a sweep: a point for each setting with its deviation over seeds; lines over a swept number.

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Colors of Okabe and Ito (2008), distinct with every kind of color vision; the yellow is too pale for lines."""
MARKERS = "osD^vP"
LOG_FROM = 20.0
"""The axis is logarithmic if the largest value is at least this many times the smallest."""


def draw(summary: Summary) -> Figure:
    """Return the first available of: the last accuracy of the average, of the student, or the loss."""
    name = next(name for name in (*ACCURACIES[::-1], "train_loss") if name in summary.names)
    rows = [row for row in summary.rows if name in row.measures]
    key = numeric_key(summary)
    lines = {} if key is None else _lines(rows, key)
    if key is None or len(lines) > len(COLORS):
        return _points(rows, name)
    return _over_number(lines, key, name)


def numeric_key(summary: Summary) -> str | None:
    """Return the one setting whose values are all numbers; None if there is not exactly one."""
    found = [
        key for key in summary.keys if all(_number(row.settings[key]) is not None for row in summary.rows)
    ]
    several = [key for key in found if len({row.settings[key] for row in summary.rows}) > 1]
    return several[0] if len(several) == 1 else None


def _lines(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """Group the rows by all other settings, and order each group by the number."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: float(row.settings[key])):
        lines.setdefault(_label(row, without=key), []).append(row)
    return lines


def _over_number(lines: dict[str, list[Row]], key: str, name: str) -> Figure:
    figure, (axes,) = new_plots("light", (8.0, 4.6))
    everything = [float(row.settings[key]) for rows in lines.values() for row in rows]
    for place, (label, rows) in enumerate(lines.items()):
        x = [float(row.settings[key]) for row in rows]
        measures = [row.measures[name] for row in rows]
        style = {"color": COLORS[place], "marker": MARKERS[place], "label": label or None}
        axes.errorbar(x, [m.mean for m in measures], yerr=_errors(measures), capsize=3, markersize=5, **style)
    if min(everything) > 0 and max(everything) / min(everything) >= LOG_FROM:
        axes.set_xscale("log")
    ticks = sorted(set(everything))
    if len(ticks) <= 12:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(key)
    axes.set_ylabel(_words(name, [row for rows in lines.values() for row in rows]))
    if any(lines):
        legend_beside(axes, "light")
    return figure


def _points(rows: Sequence[Row], name: str) -> Figure:
    """Draw a line of text for each setting, with its mean and deviation, and its seeds as small marks."""
    figure, (axes,) = new_plots("light", (8.0, max(2.0, 0.32 * len(rows) + 1.0)))
    for place, row in enumerate(rows):
        measure = row.measures[name]
        axes.plot(measure.values, [place] * len(measure.values), "|", color=COLORS[4], markersize=9, zorder=2)
        axes.errorbar([measure.mean], [place], xerr=_errors([measure]), fmt="o", color=COLORS[0],
                      capsize=3, markersize=6, zorder=3)  # fmt: skip
    axes.set_yticks(range(len(rows)), [_label(row) or "as in the recipe" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(_words(name, rows))
    return figure


def _errors(measures: Sequence[Measure]) -> list[float]:
    """Nothing is drawn where there is no deviation."""
    return [math.nan if measure.std is None else measure.std for measure in measures]


def _label(row: Row, without: str = "") -> str:
    return ", ".join(
        f"{key.rpartition('.')[2]}={_short(value)}" for key, value in row.settings.items() if key != without
    )


def _short(value: str, length: int = 40) -> str:
    # matplotlib would read a text between dollar signs as a formula
    return (value if len(value) <= length else f"{value[: length - 1]}…").replace("$", r"\$")


def _words(name: str, rows: Sequence[Row]) -> str:
    words = {"test_top1": "top-1, %", "test_ema_top1": "top-1 of the average, %"}
    several = any(row.measures[name].std is not None for row in rows)
    return words.get(name, "training loss") + " (mean ± standard deviation over seeds)" * several


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
