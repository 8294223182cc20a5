"""What runs, what came out, and how long the rest will take: with a bar on a terminal, in plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn

from ...engine.progress import TwoLines
from .demo_cells import Cell

LINE_EVERY = 15.0
"""Seconds of silence after which a line says what runs, where there is no bar."""
PRIOR = 30.0
"""Seconds of work that count as if they had been done at the speed the cells' `seconds` were measured at."""
NAMED = 4
"""With more running cells than these, the others are counted."""


class Board:
    """Follows the cells by their logs; what is left takes as long as the work of this session so far did."""

    def __init__(self, cells: Sequence[Cell], processes: int, console: Console) -> None:
        self._processes, self._console = processes, console
        self._left = {cell.folder: cell.seconds for cell in cells}
        self._cells, self._finished = len(cells), 0
        self._worked = self._busy = 0.0
        self._looked = self._said = time.monotonic()
        self._bar = TwoLines(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal or console.quiet,
        )
        self._total = sum(self._left.values())
        self._task = self._bar.add_task("", total=self._total, left="")

    def __enter__(self) -> Board:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, cells: Collection[Cell], finished: int) -> None:
        """Say what there is to do; what earlier sessions did is no work of this one."""
        self._finished = finished
        self._left = {cell.folder: (1.0 - cell.progress()) * cell.seconds for cell in cells}
        there = f", {finished} of them finished before" if finished else ""
        self._say(f"{self._cells} cells{there}; {self._processes} at a time{self._time_left()}")

    def finish(self, cell: Cell) -> None:
        """Say the result of a cell."""
        self._work(cell, 1.0)
        self._finished += 1
        curve = cell.curve()
        outcome = f"{curve[-1][1]:.1f} %" if curve else "finished"
        self._say(f"cell {self._finished} of {self._cells}, {cell}: {outcome}{self._time_left()}")

    def look(self, running: Collection[Cell]) -> None:
        """See how far the running cells are; say so now and then."""
        now = time.monotonic()
        self._busy += (now - self._looked) * len(running)
        self._looked = now
        if self._bar.disable and now - self._said < LINE_EVERY:
            return
        for cell in running:
            self._work(cell, cell.progress())
        left = self._time_left()
        self._bar.update(
            self._task,
            completed=self._total - sum(self._left.values()),
            description=f"{self._finished} of {self._cells} cells",
            left=left.removeprefix(", "),
        )
        self._bar.numbers = _names(running)
        if self._bar.disable and running:
            self._say(f"{self._finished} of {self._cells} cells finished; running: {_names(running)}{left}")

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
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)
        self._said = time.monotonic()


def _names(running: Collection[Cell]) -> str:
    named = [f"{cell} ({100 * cell.progress():.0f} %)" for cell in list(running)[:NAMED]]
    return ", ".join(named) + (f" and {len(running) - NAMED} more" if len(running) > NAMED else "")
