"""The demo: a teacher with labels and one without, students with few, and a report of what attention was worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from ....models.errors import ConfigError
from ...cells.pool import refuse_links, run_in_processes, torch_threads, usable_cores
from .demo_cells import Cell, demo_cells
from .demo_report import accuracy_table, measure, write_report

LINE_EVERY = 15.0
"""Seconds of silence after which a line says what runs."""
PRIOR = 30.0
"""Seconds of work that count as if they had been done at the speed the cells' `seconds` were measured at."""


class Board:
    """Follows the cells by their logs; what is left takes as long as the work of this session so far did."""

    def __init__(self, cells: Sequence[Cell], processes: int, tell: Callable[[str], object]) -> None:
        self._processes, self._tell = processes, tell
        self._left = {cell.folder: (1.0 - cell.progress()) * cell.seconds for cell in cells}
        self._finished = sum(cell.state() == "done" for cell in cells)
        self._worked = self._busy = 0.0
        self._looked = self._said = time.monotonic()
        there = f", {self._finished} of them finished before" if self._finished else ""
        self._say(f"{len(cells)} cells{there}; {processes} at a time{self._time_left()}")

    def finish(self, cell: Cell) -> None:
        """Say the result of a cell."""
        self._work(cell, 1.0)
        self._finished += 1
        curve = cell.curve()
        outcome = f"{curve[-1][1]:.1f} %" if curve else "finished"
        self._say(f"cell {self._finished} of {len(self._left)}, {cell}: {outcome}{self._time_left()}")

    def look(self, running: Collection[Cell]) -> None:
        """See how far the running cells are; say so now and then."""
        now = time.monotonic()
        self._busy += (now - self._looked) * len(running)
        self._looked = now
        if not running or now - self._said < LINE_EVERY:
            return
        for cell in running:
            self._work(cell, cell.progress())
        names = ", ".join(f"{cell} ({100 * cell.progress():.0f} %)" for cell in running)
        done = f"{self._finished} of {len(self._left)} cells finished"
        self._say(f"{done}; running: {names}{self._time_left()}")

    def _work(self, cell: Cell, share: float) -> None:
        """Note that `share` of the cell's work is done."""
        left = (1.0 - share) * cell.seconds
        self._worked += self._left[cell.folder] - left
        self._left[cell.folder] = left

    def _time_left(self) -> str:
        """Return `, about 4 min left`; empty at the end."""
        left = max(sum(self._left.values()) / self._processes, *self._left.values())
        if left <= 0.0:
            return ""
        minutes = round(left * (PRIOR + self._busy) / (PRIOR + self._worked) / 60)
        return f", about {minutes} min left" if minutes else ", less than a minute left"

    def _say(self, line: str) -> None:
        self._tell(line)
        self._said = time.monotonic()


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
    processes = usable_cores() if processes is None else processes
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, seeds))} must be whole numbers from 0 on, each once")
    if min(processes, threads) < 1:
        raise ConfigError(f"--processes {processes} and --threads {threads} must be at least 1")
    # Absolute, so that a run resumes from any working directory.
    cells = demo_cells(output_dir.resolve(), seeds, quick, threads)
    console = Console(quiet=not progress)
    tell = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    for cell in cells:
        if cell.state() != "done":
            refuse_links(cell.folder, output_dir.resolve())
    board = Board(cells, processes, tell)
    run_in_processes(cells, processes, look=board.look, finish=board.finish)
    tell("comparing the students and writing the report")
    with torch_threads(threads):
        results = measure(cells, quick)
    report = write_report(results, output_dir)
    tell(accuracy_table(results).to_text())
    return report
