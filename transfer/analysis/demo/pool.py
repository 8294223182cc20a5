"""The demo's cells side by side: a process each, as many as there are cores, none of which outlives the demo."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess, parent_process

import torch

from ....models.errors import GraftError, RunFailedError
from ...engine.signals import StopSignals
from ...engine.train import train
from .board import Board
from .demo_cells import Cell

LOOK_EVERY = 0.5
"""Seconds between two looks at the signals and the clock while nothing ends."""
PATIENCE = 60.0
"""Seconds that a cell has to save what it has when it is told to stop."""


class DemoStoppedError(GraftError):
    """A signal ended the demo; what was done is saved."""

    def __init__(self, number: int, done: int, cells: int) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name} with {done} of {cells} cells finished and the running ones saved; "
            "the same command goes on from there"
        )
        self.exit_code = 128 + number


def run_cells(cells: Sequence[Cell], board: Board, *, processes: int, threads: int) -> None:
    """Run the cells that are not finished, teachers before their students.

    Raises:
        DemoStoppedError: on SIGINT, SIGTERM or SIGUSR2; the running cells are saved.
        RunFailedError: a cell failed; the others are saved.
        ConfigError: a cell was run with other settings before.
    """
    finished = [cell for cell in cells if cell.is_finished(threads)]
    waiting = [cell for cell in cells if cell not in finished]
    running: dict[BaseProcess, Cell] = {}
    board.start(cells, len(finished))
    with StopSignals() as signals, _stopped_at_the_end(running):
        try:
            while waiting or running:
                for cell in _ready(waiting, running.values())[: processes - len(running)]:
                    waiting.remove(cell)
                    running[_start(cell, threads)] = cell
                wait([process.sentinel for process in running], timeout=LOOK_EVERY)
                if signals.received is not None:
                    raise DemoStoppedError(signals.received, len(finished), len(cells))
                for process in [process for process in running if not process.is_alive()]:
                    cell = running.pop(process)
                    _check(cell, process)
                    finished.append(cell)
                    board.finish(cell)
                board.look(running.values())
        except KeyboardInterrupt as interrupt:
            raise DemoStoppedError(signal.SIGINT, len(finished), len(cells)) from interrupt


def _ready(waiting: Collection[Cell], running: Collection[Cell]) -> list[Cell]:
    """The cells whose teacher is finished, or that need none."""
    missing = {cell.folder for cell in (*waiting, *running)}
    return [cell for cell in waiting if cell.needs not in missing]


def _start(cell: Cell, threads: int) -> BaseProcess:
    """A process that starts as a copy of one that has loaded the engine, which takes seconds to load."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "sklearn.datasets"])
        process: BaseProcess = context.Process(target=_run, args=(cell, threads))
    else:  # Windows
        process = multiprocessing.get_context("spawn").Process(target=_run, args=(cell, threads))
    process.start()
    return process


def _run(cell: Cell, threads: int) -> None:
    """The life of a cell's process. What it says goes into its log; it stops when the demo is gone."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C is for the demo, which then tells its cells to stop
    cell.folder.mkdir(parents=True, exist_ok=True)
    with cell.log.open("a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("graftvit").setLevel(logging.INFO)
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        result = train(cell.config)
    except GraftError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    if result.signal is not None:
        raise SystemExit(f"stopped by {signal.Signals(result.signal).name}")
    cell.finish(threads)


def _stop_without_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)  # saves at the next step
        time.sleep(PATIENCE)
        os._exit(1)


def _check(cell: Cell, process: BaseProcess) -> None:
    """Raises RunFailedError: the process did not bring the cell to its end."""
    if process.exitcode == 0:
        return
    if process.exitcode is not None and process.exitcode < 0:
        why = f"it was ended by {signal.Signals(-process.exitcode).name}"
    else:
        lines = cell.log.read_text(errors="replace").split("\n") if cell.log.exists() else []
        why = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    raise RunFailedError(
        f"{cell} failed: {why} (log: {cell.log}); what is finished stays, the same command goes on from there"
    )


@contextmanager
def _stopped_at_the_end(running: dict[BaseProcess, Cell]) -> Iterator[None]:
    """Whatever ends the block, no process is left: first it may save, then it is killed."""
    try:
        yield
    finally:
        try:
            for process in running:
                process.terminate()
            last = time.monotonic() + PATIENCE
            for process in running:
                process.join(max(0.0, last - time.monotonic()))
        finally:  # a second Ctrl-C waits no longer
            for process in running:
                process.kill()
                process.join()
