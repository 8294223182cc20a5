"""A benchmark from its first case to its last: what was measured before is kept, each case is written at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ....checkpoints.atomic import write_bytes, write_text
from ....models.errors import ConfigError
from ...cells.sharing import left_to_run, run_in_turn
from ..report.ink import to_png
from .benchmark_tables import render
from .cases import Case, Kind, Results, Row, drifted, load_results, machine
from .latency_plot import draw_latency
from .timing import keep_freed_memory

logger = logging.getLogger(__name__)
AGAIN = 2
"""How often rows are measured again whose reference drifted."""


def run_cases(
    kind: Kind,
    cases: Sequence[Case],
    measure: Callable[[Case], Row],
    folder: Path,
    *,
    force: bool = False,
    tell: Callable[[str], None] = logger.info,
) -> Results:
    """Measure the cases that `folder` does not have yet, and write tables and the plot.

    Rows whose reference drifted are measured again, and marked where it drifts still.

    Args:
        kind: What the cases are of.
        cases: In the order in which they are measured.
        measure: Gives the row of a case.
        folder: Gets `results.json` and `results.csv` after each case, `table.md` and `latency.png` at the end.
        force: Drop what is in the folder.
        tell: Called with a line before and after each case.

    Raises ConfigError: the folder has results of another kind or machine.
    """
    results = Results(kind, machine()) if force else load_results(folder, kind)
    keep_freed_memory()

    def run(case: Case) -> str:
        row = measure(case)
        results.rows.append(row)
        results.save(folder)
        return f"{1e3 * row.median:.3g} ms, {row.ratio:.2f} times as fast as {case.beside}"

    run_in_turn(left_to_run(cases, results.state, tell), run, tell)
    for _ in range(AGAIN):
        for row in drifted(row for row in results.rows if row.case in cases):
            tell(f"{row.case}: {row.case.beside} took {1e3 * row.softmax:.3g} ms, in other rows not: again")
            results.rows[results.rows.index(row)] = measure(row.case)
            results.save(folder)
    asked = Results(kind, results.machine, [row for row in results.rows if row.case in cases])
    write_text(folder / "table.md", render(asked))
    write_bytes(folder / "latency.png", to_png(draw_latency(asked.rows), ground="white"))
    return asked


def check_device(device: str) -> str:
    """Return the device, where this machine has it. Raises ConfigError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; take --device cpu")
    return device
