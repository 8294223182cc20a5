"""The tables of a benchmark, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..report.tables import markdown, milliseconds
from .cases import Results, Row, drifted
from .crossover import crossovers

MARK = "†"
"""Of numbers whose reference drifted."""
MISCOUNT = 0.05
"""How far an operator's own account may be from the counter before the table says so."""


def render(results: Results) -> str:
    """Return a table of cases for each setting, and one of crossovers."""
    loads = [row.load for row in results.rows]
    beside = "fused softmax attention" if results.kind == "operators" else "the unconverted model"
    first = (
        f"{results.machine}. Ratio: how many times as fast as {beside}, timed in turn with it in the "
        "same run. Spread: first to third quartile. CPU ms: processor time of all threads, in which other programs on "
        "the machine have no part. Load average while measuring "
        f"{min(loads, default=0):.1f} to {max(loads, default=0):.1f}."
    )
    parts = [first]
    for setting, rows in _settings(results.rows).items():
        parts += [f"### {setting}", size_table(rows) + _miscounted(rows) + _unsteady(rows)]
        if any(row.straight or row.public for row in rows):
            parts.append(peers_table(rows))
    if crossovers(results.rows):
        size = "N" if results.kind == "operators" else "image side"
        heading = f"### Crossover: the {size} from which it is faster than {beside}"
        parts += [heading, crossover_table(results)]
    return "\n\n".join(parts) + "\n"


def crossover_table(results: Results) -> str:
    """Return a line an operator or plan, a column a setting."""
    found = crossovers(results.rows)
    settings = list(dict.fromkeys(case.setting for case in found))
    names = list(dict.fromkeys(case.name for case in found))
    cells = {(case.name, case.setting): str(value) for case, value in found.items()}
    head = "operator" if results.kind == "operators" else "plan"
    return markdown(
        [head, *settings], [[name, *(cells.get((name, one), "") for one in settings)] for name in names]
    )


def size_table(rows: Sequence[Row]) -> str:
    """Return a line a case of one setting, the fastest first; results of older versions have no processor time."""
    beside, unsteady = rows[0].case.beside, drifted(rows)
    columns: dict[str, Callable[[Row, str], str]] = {
        "operator" if rows[0].case.kind == "operators" else "plan": lambda row, _: row.case.name,
        "ms": lambda row, _: milliseconds(row.median),
        "spread": lambda row, _: f"{milliseconds(row.low)}–{milliseconds(row.high)}",
        "CPU ms": lambda row, _: _processor(row.cpu),
        f"{beside} ms": lambda row, mark: f"{milliseconds(row.softmax)}{mark}",
        "its CPU ms": lambda row, _: _processor(row.softmax_cpu),
        "ratio": lambda row, mark: f"{row.ratio:.2f}{mark}",
        "images/s": lambda row, _: f"{row.case.batch / row.median:,.1f}",
        "peak MiB": lambda row, _: f"{row.peak_bytes / 2**20:,.1f}",
        "attention MMACs": lambda row, _: f"{row.macs / 1e6:,.1f}",
        "counted": lambda row, _: f"{row.counted_macs / 1e6:,.1f}",
    }
    if all(row.cpu is None for row in rows):
        del columns["CPU ms"], columns["its CPU ms"]
    lines = [
        [text(row, MARK if row in unsteady else "") for text in columns.values()]
        for row in sorted(rows, key=lambda row: -row.ratio)
    ]
    return markdown(list(columns), lines)


def _processor(seconds: float | None) -> str:
    return "" if seconds is None else milliseconds(seconds)


def peers_table(rows: Sequence[Row]) -> str:
    """Return a line a case of one setting: its time over those of its straight-line form and of a public package."""
    head = ["operator", "ms", "straight-line ms", "ratio", "public implementation", "its ms", "ratio"]
    lines = []
    for row in sorted(rows, key=lambda row: row.case.name):
        beside = [
            cell
            for seconds in (row.straight, row.public)
            for cell in (
                ("", "") if seconds is None else (milliseconds(seconds), f"{row.median / seconds:.2f}")
            )
        ]
        lines.append([row.case.name, milliseconds(row.median), *beside[:2], row.package, *beside[2:]])
    return "Time over the time of other forms; below 1 the operator is faster:\n\n" + markdown(head, lines)


def _settings(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.case.size):
        found.setdefault(f"{row.case.size_text}, {row.case.setting}", []).append(row)
    return found


def _miscounted(rows: Sequence[Row]) -> str:
    """Name the operators whose count differs from torch's; empty where none does."""
    names = [row.case.name for row in rows if abs(row.counted_macs - row.macs) > MISCOUNT * row.macs]
    if not names:
        return ""
    return (
        f"\n\nMore than {MISCOUNT:.0%} between own and counted multiply-adds, where sums over elements, "
        f"poolings or kernels of which torch's counter does not know matter: {', '.join(names)}."
    )


def _unsteady(rows: Sequence[Row]) -> str:
    """Explain the mark of rows whose reference drifted; empty where none did."""
    if not drifted(rows):
        return ""
    beside = rows[0].case.beside
    return (
        f"\n\n{MARK} {beside} took another time than in the other rows, each time that it was measured: the machine "
        "was busy, the ratio says nothing, and no crossover is given. Measure again when nothing else runs."
    )
