"""Summarize a sweep: one row for each setting, with mean and standard deviation over its seeds, as tables and a plot.

Only the run folders of the cells are read.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..checkpoints.atomic import write_bytes
from ..checkpoints.files import read_json, read_records
from ..checkpoints.markdown import plain
from ..models.errors import ConfigError, GraftError, counted
from ..transfer.analysis.report.ink import legend_beside, new_plots, to_png
from ..transfer.analysis.report.tables import Table
from ..transfer.metrics.intervals import Interval, accuracy_interval
from .progress import SCORES, current_stage, read_progress
from .slurm.folder import JobFolder
from .sweep import SWEEP_FILE, load_sweep

ACCURACIES = tuple(f"test_{of}{name}" for name in reversed(SCORES) for of in ("", "ema_"))
LOSS, DIVERGENCE = "train_loss", "map_divergence"
SAMPLES = "test_samples"
NUMBERS = (*(f"{best}{name}" for name in ACCURACIES for best in ("", "best_")), LOSS, DIVERGENCE)


def read_cell(folder: Path) -> dict[str, float] | str:
    """Return the results of a cell: accuracies in percent, last and best_; the last train_loss; the map_divergence.

    Without results, return how it failed, or how far it is. A cell is done if its last epoch is in the log and its
    student is written, failed if its last attempt recorded that, and otherwise unfinished. For a recipe with stages,
    the current stage counts.
    """
    run, attempts = current_stage(folder), JobFolder(folder).attempts()
    done, epochs = read_progress(folder), _epochs(run / "log.jsonl")
    over = not attempts or attempts[-1].outcome is not None  # and is not trained for more epochs
    whole = bool(done.total_steps and epochs and epochs[-1]["step"] >= done.total_steps)
    if over and whole and (folder / "student").is_dir():
        return _numbers(epochs) | _divergence(run)
    if attempts and attempts[-1].outcome == "failed":
        why = " ".join(attempts[-1].why.split())
        return f"failed: {why if len(why) <= 200 else f'{why[:199]}…'}"
    if not attempts and not (run / "config.yaml").is_file():
        return "not begun"
    of = f" of {done.total_steps}" if done.total_steps else ""
    stage = f"stage {done.stage}, " if done.stage else ""
    return f"unfinished: {stage}step {done.step}{of}"


def _epochs(path: Path) -> list[dict[str, Any]]:
    """Return the records at the end of an epoch; the others have no number of parameters."""
    try:
        return [record for record in read_records(path) if "n_parameters" in record]
    except GraftError:
        return []


def _numbers(epochs: list[dict[str, Any]]) -> dict[str, float]:
    found = {name: float(epochs[-1][name]) for name in (SAMPLES, LOSS) if name in epochs[-1]}
    for name in ACCURACIES:
        values = [float(record[name]) for record in epochs if name in record]
        if values:
            found |= {name: values[-1], f"best_{name}": max(values)}
    return found


def _divergence(run: Path) -> dict[str, float]:
    """Return how far the attention maps are from the teacher's, where the verdict of the run says so."""
    try:
        return {DIVERGENCE: float(read_json(run / "verdict.json")[DIVERGENCE])}
    except (GraftError, LookupError, TypeError, ValueError):
        return {}


@dataclass(frozen=True)
class Row:
    """One setting of everything but the seed."""

    settings: dict[str, str]
    asked: int
    results: list[dict[str, float]] = field(default_factory=list)
    """Of each finished cell."""
    left: list[str] = field(default_factory=list)
    """The name and the state of each other cell."""

    def values(self, name: str) -> list[float]:
        """Return this number of all finished cells that have it."""
        return [numbers[name] for numbers in self.results if name in numbers]

    @property
    def samples(self) -> int | None:
        """The test images of its cells; None where they are not known, or not the same."""
        counts = {numbers.get(SAMPLES) for numbers in self.results}
        return int(count) if len(counts) == 1 and (count := counts.pop()) else None

    def interval(self, name: str) -> Interval | None:
        """Return the 95 % interval of a mean accuracy, for the number of test images."""
        values = self.values(name)
        if not values or self.samples is None or not name.endswith("top1"):
            return None
        return accuracy_interval(statistics.fmean(values), self.samples)


def summarize(folder: Path) -> list[Row]:
    """Return what the cells of the sweep in `folder` have measured so far, in the order of the sweep.

    Raises ConfigError: no sweep was submitted to it; CheckpointError: its `sweep.json` is damaged.
    """
    sweep = load_sweep(folder)
    if sweep is None:
        raise ConfigError(
            f"{folder} is not a sweep, because it has no {SWEEP_FILE}: give the output_dir of `graftvit submit --sweep`"
        )
    groups: dict[tuple[tuple[str, str], ...], list[Path]] = {}
    for cell, settings in sweep.cells.items():
        setting = tuple((key, value) for key, value in settings.items() if key != "seed")
        groups.setdefault(setting, []).append(cell)
    rows = []
    for setting, cells in groups.items():
        row = Row(dict(setting), len(cells))
        for cell in cells:
            found = read_cell(cell)
            if isinstance(found, str):
                row.left.append(f"{cell.name} {found}")
            else:
                row.results.append(found)
        rows.append(row)
    return rows


def write_summary(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write `summary.csv` and `summary.md`, and `summary.png` when a cell is done, and return their paths.

    Raises WriteFailedError as `write_file`.
    """
    files = {"summary.csv": to_csv(rows).encode(), "summary.md": to_markdown(rows).encode()}
    if _names(rows):
        files["summary.png"] = to_png(draw(rows), ground="white")
    for name, content in files.items():
        write_bytes(folder / name, content)
    return [folder / name for name in files]


def _names(rows: Sequence[Row]) -> list[str]:
    """Return the numbers that any row has, in the order of `NUMBERS`."""
    return [name for name in NUMBERS if any(row.values(name) for row in rows)]


def _deviation(values: Sequence[float]) -> float | None:
    """The deviation of the sample (n − 1); None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def to_csv(rows: Sequence[Row]) -> str:
    """Return a row for each setting; an empty field without a number, or without a deviation of a single value."""
    names = _names(rows)
    rates = [name for name in names if name.endswith("top1")]
    head = [*rows[0].settings, "done", "asked"]
    head += [f"{name}_{kind}" for name in names for kind in ("mean", "std")]
    head += [f"{name}_{end}" for name in rates for end in ("low", "high")]
    lines = []
    for row in rows:
        line: list[object] = [*row.settings.values(), len(row.results), row.asked]
        for values in map(row.values, names):
            line += [statistics.fmean(values) if values else None, _deviation(values)]
        for interval in map(row.interval, rates):
            line += interval or (None, None)
        lines.append([*line, row.samples, "; ".join(row.left)])
    return Table([*head, "test_images", "not_done"], lines).to_csv()


def to_markdown(rows: Sequence[Row]) -> str:
    """Return the table with mean ± standard deviation over seeds and intervals, and a line for each unfinished cell."""
    names, keys = _names(rows), list(rows[0].settings)
    heads = [*(keys or ["setting"]), "done", *(name.replace("_", " ") for name in names)]
    lines = [
        [
            *(row.settings.values() or ["as in the recipe"]),
            f"{len(row.results)}/{row.asked}",
            *(_shown(row, name) for name in names),
        ]
        for row in rows
    ]
    parts = [Table(heads, lines, keys).to_markdown()]
    counts = sorted({row.samples for row in rows if row.samples})
    if counts:
        images = " or ".join(f"{count:,}" for count in counts)
        parts.append(f"[low, high] is the 95 % interval (Wilson's) of an accuracy on {images} test images.")
    if left := [f"- {plain(cell)}" for row in rows for cell in row.left]:
        parts.append(f"{counted(len(left), 'cell')} not done:\n\n" + "\n".join(left))
    return "\n\n".join(parts) + "\n"


def _shown(row: Row, name: str) -> str:
    """Return `81.20 ± 0.35 [80.1, 82.2]`: two digits after the point of an accuracy, four of others."""
    values, digits = row.values(name), 2 if name.endswith("top1") else 4
    if not values:
        return ""
    deviation, interval = _deviation(values), row.interval(name)
    std = "" if deviation is None else f" ± {deviation:.{digits}f}"
    between = "" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]"
    return f"{statistics.fmean(values):.{digits}f}{std}{between}"


# Plot a sweep: a point for each setting with its deviation over seeds; lines over a swept number.

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Colors of Okabe and Ito (2008), distinct with every kind of color vision; the yellow is too pale for lines."""
MARKERS = "osD^vP"
LOG_FROM = 20.0
"""The axis is logarithmic if the largest value is at least this many times the smallest."""


def draw(rows: Sequence[Row]) -> Figure:
    """Return the first available of: the last accuracy of the average, of the student, or the loss."""
    name = next(name for name in (*ACCURACIES[::-1], LOSS) if name in _names(rows))
    key, rows = numeric_key(rows), [row for row in rows if row.values(name)]
    lines: dict[str, list[Row]] = {}
    for row in rows if key is None else sorted(rows, key=lambda row: float(row.settings[key])):
        lines.setdefault(_label(row, without=key), []).append(row)
    if key is None or len(lines) > len(COLORS):
        return _points(rows, name)
    return _over_number(lines, key, name)


def numeric_key(rows: Sequence[Row]) -> str | None:
    """Return the one setting whose values are all numbers; None if there is not exactly one."""
    values = {key: {row.settings[key] for row in rows} for key in rows[0].settings}
    found = [key for key, several in values.items() if len(several) > 1 and all(map(_is_number, several))]
    return found[0] if len(found) == 1 else None


def _over_number(lines: dict[str, list[Row]], key: str, name: str) -> Figure:
    figure, (axes,) = new_plots("light", (8.0, 4.6))
    for place, (label, rows) in enumerate(lines.items()):
        x, means, deviations = [float(row.settings[key]) for row in rows], *_measures(rows, name)
        style = {"color": COLORS[place], "marker": MARKERS[place], "label": label or None}
        axes.errorbar(x, means, yerr=deviations, capsize=3, markersize=5, **style)
    everything = [row for rows in lines.values() for row in rows]
    ticks = sorted({float(row.settings[key]) for row in everything})
    if ticks[0] > 0 and ticks[-1] / ticks[0] >= LOG_FROM:
        axes.set_xscale("log")
    if len(ticks) <= 12:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(key)
    axes.set_ylabel(_words(name, everything))
    if any(lines):
        legend_beside(axes, "light")
    return figure


def _points(rows: Sequence[Row], name: str) -> Figure:
    """Draw a line of text for each setting, with its mean and deviation, and its seeds as small marks."""
    figure, (axes,) = new_plots("light", (8.0, max(2.0, 0.32 * len(rows) + 1.0)))
    for place, row in enumerate(rows):
        values, (mean, deviation) = row.values(name), _measures([row], name)
        axes.plot(values, [place] * len(values), "|", color=COLORS[4], markersize=9, zorder=2)
        axes.errorbar(
            mean, [place], xerr=deviation, fmt="o", color=COLORS[0], capsize=3, markersize=6, zorder=3
        )
    axes.set_yticks(range(len(rows)), [_label(row) or "as in the recipe" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(_words(name, rows))
    return figure


def _measures(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Return means and deviations; nothing is drawn where there is no deviation."""
    values = [row.values(name) for row in rows]
    deviations = [_deviation(each) for each in values]
    return list(map(statistics.fmean, values)), [math.nan if one is None else one for one in deviations]


def _label(row: Row, without: str | None = None) -> str:
    return ", ".join(
        f"{key.rpartition('.')[2]}={_short(value)}" for key, value in row.settings.items() if key != without
    )


def _short(value: str, length: int = 40) -> str:
    # matplotlib would read a text between dollar signs as a formula
    return (value if len(value) <= length else f"{value[: length - 1]}…").replace("$", r"\$")


def _words(name: str, rows: Sequence[Row]) -> str:
    units = {name: f"{text}, %" if name == "top1" else text for name, text in SCORES.items()}
    words = {f"test_{metric}": text for metric, text in units.items()}
    words |= {f"test_ema_{metric}": text.replace(",", " of the average,") for metric, text in units.items()}
    several = any(len(row.values(name)) > 1 for row in rows)
    return words.get(name, "training loss") + " (mean ± standard deviation over seeds)" * several


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
