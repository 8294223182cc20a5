"""The tables of a benchmark, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .crossover import crossovers
from .rows import Case, Results, Row

MISCOUNT = 0.05
"""How far an operator's own account may be from the counter before the table says so."""


def render(results: Results) -> str:
    """A table of cases for each setting, and one of crossovers."""
    loads = [row.load for row in results.rows]
    first = (
        f"{results.machine}. Ratio: how many times as fast as fused softmax attention, timed in turn with it in the "
        "same run. Spread: first to third quartile. Load average while measuring "
        f"{min(loads, default=0):.1f} to {max(loads, default=0):.1f}."
    )
    parts = [first]
    for setting, rows in _settings(results.rows).items():
        parts += [f"### {setting}", _cases(rows)]
    found = crossovers(results.rows)
    if found:
        size = "N" if results.kind == "operators" else "image side"
        rows_of_table = [[case.name, _setting(case), str(value)] for case, value in found.items()]
        parts += [
            f"### Crossover: the {size} from which it is faster than fused softmax attention",
            markdown(["name", "setting", size], rows_of_table),
        ]
    return "\n\n".join(parts) + "\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all but the first column to the right."""
    line = "| --- |" + " ---: |" * (len(head) - 1)
    return "\n".join(["| " + " | ".join(head) + " |", line, *("| " + " | ".join(row) + " |" for row in rows)])


def milliseconds(seconds: float) -> str:
    """Three digits, in milliseconds."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _settings(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.case.size):
        found.setdefault(f"{_size(row.case)}, {_setting(row.case)}", []).append(row)
    return found


def _size(case: Case) -> str:
    return f"{case.size:,} tokens" if case.kind == "operators" else f"{case.size} px"


def _setting(case: Case) -> str:
    parts = [case.source, f"batch {case.batch}", case.dtype, case.device]
    parts += ["forward and backward" if case.backward else "forward"]
    return ", ".join(parts + ["compiled"] * case.compiled)


def _cases(rows: Sequence[Row]) -> str:
    operators = rows[0].case.kind == "operators"
    head = ["operator" if operators else "plan", "ms", "spread", "softmax ms", "ratio"]
    head += ["images/s", "peak MiB", "attention MMACs", "counted"]
    ordered = sorted(rows, key=lambda row: -row.ratio)
    table = markdown(head, [_line(row) for row in ordered])
    off = [row for row in ordered if abs(row.counted_macs / row.macs - 1) > MISCOUNT]
    if off:
        names = ", ".join(row.case.name for row in off)
        table += (
            f"\n\nMore than {MISCOUNT:.0%} between own and counted multiply-adds, where sums over elements, "
            f"poolings or kernels of which torch's counter does not know matter: {names}."
        )
    return table


def _line(row: Row) -> list[str]:
    return [
        row.case.name,
        milliseconds(row.median),
        f"{milliseconds(row.low)}–{milliseconds(row.high)}",
        milliseconds(row.softmax),
        f"{row.ratio:.2f}",
        f"{row.case.batch / row.median:,.1f}",
        f"{row.peak_bytes / 2**20:,.1f}",
        f"{row.macs / 1e6:,.1f}",
        f"{row.counted_macs / 1e6:,.1f}",
    ]
