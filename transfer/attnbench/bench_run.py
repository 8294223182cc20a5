"""Run the trials of a benchmark in parallel processes: a cell is a program, and each of its trials has a record."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...models.errors import ConfigError
from ..cells.pool import run_in_processes
from ..cells.records import CELL_FILE, State, cell_state, load_record, save_record
from .bench_rows import Row
from .bench_settings import Bench, Trial
from .trial_run import RUN, run_trial


@dataclass(frozen=True)
class ProgramCell:
    """The trials of one program, which one process runs."""

    bench: Bench
    trials: tuple[Trial, ...]
    folder: Path
    threads: int = 1
    needs: Path | None = None

    def __str__(self) -> str:
        return self.trials[0].name or self.trials[0].program

    def state(self) -> State:
        """Return how far it is. Raises ConfigError: a trial was run with other settings."""
        states = {self._state(trial) for trial in self.trials}
        if states == {"done"}:
            return "done"
        return "to do" if states == {"to do"} else "begun"

    def run(self) -> int | None:
        """Run the trials that have no record; returns the signal that stopped one before its end."""
        torch.set_num_threads(self.threads)
        for trial in self.trials:
            folder = self.folder / trial.folder
            if self._state(trial) == "done":
                continue
            if (folder / RUN).resolve() != folder / RUN:  # a run is deleted at its end
                raise ConfigError(f"{folder} leads out of {self.folder.parent} by a link: remove the link")
            folder.mkdir(parents=True, exist_ok=True)
            found = run_trial(self.bench, trial, folder)
            if not isinstance(found, Row):
                return found
            save_record(found, folder)
        return None

    def rows(self) -> list[Row]:
        """Return the records that are there."""
        found = (load_record(Row, self.folder / trial.folder) for trial in self.trials)
        return [row for row in found if row is not None]

    def _state(self, trial: Trial) -> State:
        settings = self.bench.digest(trial.backbone, trial.data)
        return cell_state(self.folder / trial.folder, settings, flag="--out")


def list_cells(bench: Bench, trials: Sequence[Trial], out: Path, threads: int) -> list[ProgramCell]:
    """Return a cell for each program, in the order of the trials."""
    groups = [tuple(group) for _, group in itertools.groupby(trials, lambda trial: trial.program)]
    cells = out.resolve() / "cells"
    return [ProgramCell(bench, group, cells / group[0].hash, threads) for group in groups]


def run_bench(
    bench: Bench,
    trials: Sequence[Trial],
    out: Path,
    *,
    processes: int,
    threads: int,
    tell: Callable[[str], None],
) -> list[Row]:
    """Run the trials that have no record in `out`, and return the rows of all records there, also of earlier calls.

    Raises:
        StoppedError: on SIGINT, SIGTERM or SIGUSR2, after saving.
        RunFailedError: a cell failed, other than by a loss that is not finite; its log is named.
        ConfigError: `out` has a trial with other settings.
    """
    cells = list_cells(bench, trials, out, threads)
    left = [cell for cell in cells if cell.state() != "done"]
    tell(f"{len(trials)} trials of {len(cells)} programs; {len(cells) - len(left)} programs are done")
    start, ended = time.monotonic(), 0

    def finish(cell: ProgramCell) -> None:
        nonlocal ended
        ended += 1
        seconds = (time.monotonic() - start) / ended * (len(left) - ended)
        tell(f"[{ended}/{len(left)}] {_outcome(cell)}; {seconds / 60:.0f} min to go")

    run_in_processes(cells, processes, look=lambda running: None, finish=finish)
    return _all_rows(out)


def _all_rows(out: Path) -> list[Row]:
    found = (load_record(Row, path.parent) for path in (out / "cells").glob(f"*/*/{CELL_FILE}"))
    return [row for row in found if row is not None]


def _outcome(cell: ProgramCell) -> str:
    rows = cell.rows()
    scores = [f"{row.top1:.1f}" for row in rows if row.top1 is not None]
    reasons = [row.reason for row in rows if row.reason]
    return f"{cell}: {', '.join([*scores, *reasons[:1]])}"
