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
from .cases import Case, Kind, Results, Row, load_results, machine
from .latency_plot import draw_latency
from .timing import keep_freed_memory

logger = logging.getLogger(__name__)


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
    asked = Results(kind, results.machine, [row for row in results.rows if row.case in cases])
    write_text(folder / "table.md", render(asked))
    write_bytes(folder / "latency.png", to_png(draw_latency(asked.rows), ground="white"))
    return asked


def check_device(device: str) -> str:
    """Return the device, where this machine has it. Raises ConfigError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; take --device cpu")
    return device
