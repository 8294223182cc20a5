"""A benchmark from its first case to its last: what was measured before is kept, and each case is written at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ....checkpoints.atomic import write_file
from ....models.errors import ConfigError
from .benchmark_tables import render
from .cases import Case, Kind, Results, Row, load_results, machine, write_text
from .latency_plot import draw_latency, to_png

logger = logging.getLogger(__name__)

TABLE, PLOT = "table.md", "latency.png"


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
        force: Drop what is in the folder, and measure all anew.
        tell: Called with a line before and after each case.

    Raises ConfigError: the folder has results of another kind or machine.
    """
    results = Results(kind, machine()) if force else load_results(folder, kind)
    left = [case for case in cases if not results.has(case)]
    if len(left) < len(cases):
        tell(f"{len(cases) - len(left)} of {len(cases)} cases are in {folder} already")
    start = time.monotonic()
    for number, case in enumerate(left, 1):
        tell(f"[{number}/{len(left)}] {case.describe()}")
        row = measure(case)
        results.rows.append(row)
        results.save(folder)
        rest = (time.monotonic() - start) / number * (len(left) - number)
        tell(f"    {1e3 * row.median:.3g} ms, {row.ratio:.2f} times as fast as softmax; {rest:.0f} s to go")
    asked = Results(kind, results.machine, [row for row in results.rows if row.case in cases])
    write_text(folder / TABLE, render(asked))
    image = to_png(draw_latency(asked.rows))
    write_file(folder / PLOT, lambda temporary: _write(temporary, image), size=len(image))
    return asked


def check_device(device: str) -> str:
    """The device, where this machine has it. Raises ConfigError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; take --device cpu")
    return device


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
