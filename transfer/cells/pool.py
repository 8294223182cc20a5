"""Cells side by side: a process each, some at a time, none of which outlives the process that started them."""

from __future__ import annotations

import faulthandler
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path
from typing import Protocol, TypeVar

from ...checkpoints.files import UnreadableError, open_regular
from ...models.errors import GraftError, RunFailedError
from ..engine.signals import StopSignals
from .records import State

LOOK_EVERY = 0.5
"""Seconds between two looks at the signals and the clock while nothing ends."""
END = 1 << 16
"""Bytes at the end of a log in which the reason of a failure is looked for."""
PATIENCE = 60.0
"""Seconds that a cell has to save what it has when it is told to stop."""


class PoolCell(Protocol):
    """A cell that runs in a process of its own. Its `str` names it."""

    @property
    def folder(self) -> Path:
        """Its folder, which has its log."""

    @property
    def needs(self) -> Path | None:
        """The folder of the cell that must be done before this one."""

    def state(self) -> State:
        """Return how far it is."""

    def run(self) -> int | None:
        """Run it to its end, and write its record; returns the signal that stopped it before."""


C = TypeVar("C", bound=PoolCell)


class StoppedError(GraftError):
    """A signal stopped the work; what was done is saved."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {where}; the same command resumes")
        self.exit_code = 128 + number


def run_in_processes(
    cells: Sequence[C],
    processes: int,
    *,
    look: Callable[[Collection[C]], object],
    finish: Callable[[C], object],
) -> None:
    """Run the cells that are not done, `processes` at a time; a cell waits for the one that it needs.

    `finish` is called with each cell that ends, and `look`, often, with those that are running.

    Raises:
        StoppedError: on SIGINT, SIGTERM or SIGUSR2; the running cells are saved.
        RunFailedError: a cell failed; the others are saved.
        ConfigError: a cell was done with other settings before.
    """
    waiting = [cell for cell in cells if cell.state() != "done"]
    finished = len(cells) - len(waiting)
    running: dict[BaseProcess, C] = {}
    with StopSignals() as signals, _stopped_at_the_end(running):
        try:
            while waiting or running:
                for cell in _ready(waiting, running.values())[: processes - len(running)]:
                    waiting.remove(cell)
                    running[_start(cell)] = cell
                wait([process.sentinel for process in running], timeout=LOOK_EVERY)
                if signals.received is not None:
                    raise _stopped(signals.received, finished, len(cells))
                for process in [process for process in running if not process.is_alive()]:
                    cell = running.pop(process)
                    _check(cell, process)
                    finished += 1
                    finish(cell)
                look(running.values())
        except KeyboardInterrupt as interrupt:
            raise _stopped(signal.SIGINT, finished, len(cells)) from interrupt


def log_of(cell: PoolCell) -> Path:
    """Return the file of what the cell's process says, a traceback too."""
    return cell.folder / "output.log"


def _stopped(number: int, done: int, cells: int) -> StoppedError:
    return StoppedError(number, f"with {done} of {cells} cells finished and the running ones saved")


def _ready(waiting: Collection[C], running: Collection[C]) -> list[C]:
    """Return the cells that wait for no other."""
    missing = {cell.folder for cell in (*waiting, *running)}
    return [cell for cell in waiting if cell.needs not in missing]


def _start(cell: PoolCell) -> BaseProcess:
    """Start a process as a copy of one that has loaded the cell's code, which takes seconds to load."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, type(cell).__module__])
        process: BaseProcess = context.Process(target=_run, args=(cell,))
    else:  # Windows
        process = multiprocessing.get_context("spawn").Process(target=_run, args=(cell,))
    process.start()
    return process


def _run(cell: PoolCell) -> None:
    """Live as a cell's process: what it says goes into its log, and it stops when its parent is gone."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C is for the parent, which then tells its cells to stop
    gc.freeze()  # or searching for garbage copies all that was loaded before the fork
    cell.folder.mkdir(parents=True, exist_ok=True)
    with log_of(cell).open("a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("graftvit").setLevel(logging.INFO)
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    try:
        number = cell.run()
    except GraftError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    if number is not None:
        raise SystemExit(f"stopped by {signal.Signals(number).name}")


def _stop_without_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)  # saves at the next step
        time.sleep(PATIENCE)
        os._exit(1)


def _check(cell: PoolCell, process: BaseProcess) -> None:
    """Raise RunFailedError where the process did not bring the cell to its end."""
    if process.exitcode == 0:
        return
    log = log_of(cell)
    if process.exitcode is not None and process.exitcode < 0:
        why = f"it was ended by {signal.Signals(-process.exitcode).name}"
    else:
        lines = _end_of(log).splitlines()
        why = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    raise RunFailedError(
        f"{cell} failed: {why} (log: {log}); what is finished stays, the same command resumes"
    )


def _end_of(log: Path) -> str:
    """Return the last lines of a log; empty if it cannot be read."""
    try:
        with open_regular(log, refusal=UnreadableError) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - END))
            return file.read(END).decode("utf-8", "replace")
    except OSError:
        return ""


@contextmanager
def _stopped_at_the_end(running: Mapping[BaseProcess, PoolCell]) -> Iterator[None]:
    """Leave no process, whatever ends the block: each may save first, then it is killed."""
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
