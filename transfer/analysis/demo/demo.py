"""The demo: a teacher with labels and one without, students with few, and a report of what attention was worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import joblib
from rich.console import Console
from rich.table import Table

from ....models.errors import ConfigError
from ...cells.pool import run_in_processes
from ...cells.threads import torch_threads
from . import report_text as text
from .board import Board
from .demo_cells import demo_cells
from .demo_report import TABLE_HEAD, table_groups, table_row, write_report
from .outcomes import measure
from .results import DemoResults

SEEDS = (0, 1, 2, 3, 4)


def run_demo(
    output_dir: Path,
    quick: bool = False,
    *,
    seeds: Sequence[int] | None = None,
    processes: int | None = None,
    threads: int = 1,
    progress: bool = True,
) -> Path:
    """Train teachers and students, compare them, and write the report; returns the path of `report.html`.

    Finished runs are not run again, and an interrupted one resumes from its last save.

    Args:
        output_dir: Gets `report.html`, `report.md`, `images/` and the run folders.
        quick: One seed, and 40 % of the teachers' training.
        seeds: 0 to 4 by default, and 0 alone for a quick demo.
        processes: Cells that run at a time; one a core by default. The numbers do not depend on it.
        threads: Threads of a cell. The last digits depend on it, and so do the numbers.
        progress: Show the cells, the time left and the table on standard output.

    Raises:
        StoppedError: on SIGINT, SIGTERM or SIGUSR2, after saving.
        RunFailedError: a cell failed; its log is named.
    """
    seeds = seeds or (SEEDS[:1] if quick else SEEDS)
    processes = joblib.cpu_count() if processes is None else processes
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, seeds))} must be whole numbers from 0 on, each once")
    if min(processes, threads) < 1:
        raise ConfigError(f"--processes {processes} and --threads {threads} must be at least 1")
    # Absolute, so that a run resumes from any working directory.
    cells = demo_cells(output_dir.resolve(), seeds, quick, threads)
    console = Console(quiet=not progress)
    finished = sum(cell.state() == "done" for cell in cells)
    with Board(cells, processes, console) as board:
        board.start(cells, finished)
        run_in_processes(cells, processes, look=board.look, finish=board.finish)
    console.print("comparing the students and writing the report")
    with torch_threads(threads):
        results = measure(cells, quick)
    report = write_report(results, output_dir)
    console.print(_table(results))
    return report


def _table(results: DemoResults) -> Table:
    """Return the report's table for a terminal."""
    seeds = f", {len(results.seeds)} seeds" if len(results.seeds) > 1 else ""
    caption = f"top-1 on {results.test_images} test images, {results.labels} labels{seeds}"
    table = Table(title=text.TITLE, caption=caption)
    for column in TABLE_HEAD:
        table.add_column(column, justify="left" if column == "method" else "right")
    for title, methods in table_groups(results):
        if title is not None:
            table.add_section()
            table.add_row(f"[bold]{title}[/bold]")
        for method in methods:
            table.add_row(*table_row(results, method))
    return table
