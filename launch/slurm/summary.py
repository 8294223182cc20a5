"""The result of a sweep: a row a setting, mean and standard deviation over its seeds, as tables and a plot."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...checkpoints.atomic import write_file
from ...checkpoints.markdown import plain
from ...models.errors import ConfigError, counted
from .summary_cells import ACCURACIES, LOSS, CellResult, read_cell
from .sweep import SWEEP_FILE, load_sweep

SEED = "seed"
NUMBERS = (*(f"{best}{name}" for name in ACCURACIES for best in ("", "best_")), LOSS)
NAME = "summary"


@dataclass(frozen=True)
class Measure:
    """One number of all seeds that are done."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Of the sample (n − 1); None of one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """One setting of everything but the seed."""

    settings: dict[str, str]
    cells: tuple[CellResult, ...]

    @property
    def done(self) -> int:
        return sum(cell.state == "done" for cell in self.cells)

    @property
    def asked(self) -> int:
        return len(self.cells)

    @property
    def measures(self) -> dict[str, Measure]:
        """Of the names in `NUMBERS`, those that the cells which are done have."""
        done = [result.numbers for result in self.cells if result.state == "done"]
        values = {name: tuple(one[name] for one in done if name in one) for name in NUMBERS}
        return {name: Measure(found) for name, found in values.items() if found}


@dataclass(frozen=True)
class Summary:
    """All rows in the order of the sweep."""

    folder: Path
    keys: tuple[str, ...]
    """What was swept, the seed aside."""
    rows: tuple[Row, ...]

    @property
    def names(self) -> list[str]:
        """The numbers that any row has, in the order of `NUMBERS`."""
        return [name for name in NUMBERS if any(name in row.measures for row in self.rows)]

    @property
    def missing(self) -> list[CellResult]:
        """The cells that are not done."""
        return [result for row in self.rows for result in row.cells if result.state != "done"]


def summarize(folder: Path) -> Summary:
    """What the cells of the sweep in `folder` measured so far.

    Raises ConfigError: no sweep was submitted to it; CheckpointError: its `sweep.json` is damaged.
    """
    sweep = load_sweep(folder)
    if sweep is None:
        raise ConfigError(
            f"{folder} is no sweep, for it has no {SWEEP_FILE}: give the output_dir of `graftvit submit --sweep`"
        )
    rows: dict[tuple[tuple[str, str], ...], list[CellResult]] = {}
    for cell in sweep.cells:
        setting = tuple((key, value) for key, value in cell.settings.items() if key != SEED)
        rows.setdefault(setting, []).append(read_cell(cell))
    keys = tuple(axis.key for axis in sweep.axes if axis.key != SEED)
    return Summary(folder, keys, tuple(Row(dict(setting), tuple(found)) for setting, found in rows.items()))


def write_summary(summary: Summary) -> list[Path]:
    """Writes `summary.csv` and `summary.md`, and `summary.png` when a cell is done, and returns their paths.

    Raises WriteFailedError as `write_file`.
    """
    files = {".csv": to_csv(summary).encode(), ".md": to_markdown(summary).encode()}
    if summary.names:
        from .summary_plot import to_png

        files[".png"] = to_png(summary)
    for suffix, content in files.items():
        _write(summary.folder / f"{NAME}{suffix}", content)
    return [summary.folder / f"{NAME}{suffix}" for suffix in files]


def to_csv(summary: Summary) -> str:
    """A row a setting; empty where there is no number, or no deviation for there is one value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}_{kind}" for name in summary.names for kind in ("mean", "std")]
    writer.writerow([*summary.keys, "done", "asked", *columns, "not_done"])
    for row in summary.rows:
        numbers: list[float | str] = []
        for name in summary.names:
            measure = row.measures.get(name)
            std = None if measure is None else measure.std
            numbers += ["" if measure is None else measure.mean, "" if std is None else std]
        left = "; ".join(_state(result) for result in row.cells if result.state != "done")
        settings = [row.settings[key] for key in summary.keys]
        writer.writerow([*settings, row.done, row.asked, *numbers, left])
    return text.getvalue()


def to_markdown(summary: Summary) -> str:
    """The table with mean ± standard deviation, and a line for each cell that is not done."""
    heads = [name.replace("_", " ") for name in summary.names]
    lines = [[*(summary.keys or ["setting"]), "done", *heads]]
    for row in summary.rows:
        settings = [row.settings[key] for key in summary.keys] or ["as in the recipe"]
        numbers = [shown(row.measures.get(name), name) for name in summary.names]
        lines.append([*settings, f"{row.done}/{row.asked}", *numbers])
    left = "\n".join(f"- {plain(_state(result))}" for result in summary.missing)
    parts = [_table(lines, len(summary.keys) or 1)]
    if summary.missing:
        parts.append(f"{counted(len(summary.missing), 'cell')} not done:\n\n{left}")
    return "\n\n".join(parts) + "\n"


def shown(measure: Measure | None, name: str) -> str:
    """`81.20 ± 0.35`: two digits after the point of an accuracy, four of a loss; empty where there is none."""
    if measure is None:
        return ""
    digits = 4 if name == LOSS else 2
    std = "" if measure.std is None else f" ± {measure.std:.{digits}f}"
    return f"{measure.mean:.{digits}f}{std}"


def _state(result: CellResult) -> str:
    return f"{result.cell.name} {result.state}" + (f": {result.why}" if result.why else "")


def _table(lines: Sequence[Sequence[str]], words: int) -> str:
    """Markdown; the first `words` columns to the left, the numbers to the right."""
    rule = ["---"] * words + ["---:"] * (len(lines[0]) - words)
    shown = [[plain(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [shown[0], rule, *shown[1:]])


def _write(path: Path, content: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_file(path, write, size=len(content))
