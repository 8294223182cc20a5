"""Many pieces of work, each done, failed and resumed alone: what a comparison, a benchmark or the demo runs.

A cell has a key, which is the name of its folder or its row in a file of results, and a record, which is written
when the cell ends. The record holds a digest of the settings that its numbers depend on. A cell that is done is
never run again; one that failed is. A cell that was stopped resumes by itself, from what is in its folder. Side by
side, each has a process, and none outlives the process that started them.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ..checkpoints.atomic import write_shared, write_text
from ..checkpoints.files import UnreadableError, open_regular, read_if_there
from ..models.errors import ConfigError, GraftError, RunFailedError, did_you_mean
from .engine.signals import StopSignals

# The record of a cell in its folder, `cell.json`, and how far the cell is.

CELL_FILE = "cell.json"
State = Literal["done", "failed", "begun", "to do"]
Whole = Annotated[int, Field(ge=0, lt=1 << 63)]
R = TypeVar("R")


@dataclass(frozen=True)
class Ending:
    """What every record holds; an application's own record has more fields."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False, str_max_length=20_000)
    settings: str
    """The digest of all settings that the cell's numbers depend on."""
    error: str | None = None
    """Why the cell failed; None where it is done."""


def cell_state(folder: Path, settings: str, differing: str = "settings", flag: str = "--output_dir") -> State:
    """Return how far the cell in `folder` is, by its record.

    Raises ConfigError: the cell was done with other settings than those of the digest, in words `differing`, and
    `flag` names another folder; or its record is damaged.
    """
    record = load_record(Ending, folder)
    if record is None:
        return "begun" if folder.exists() else "to do"
    if record.error is not None:
        return "failed"
    if record.settings != settings:
        raise ConfigError(f"{folder} was measured with other {differing}; take another {flag}, or remove it")
    return "done"


def refuse_links(folder: Path, root: Path) -> None:
    """Raise ConfigError where a link below `root`, or in the cell's `folder`, leads what is written elsewhere."""
    for path in (folder, *folder.glob("*")):
        if path.resolve() != root.resolve() / path.relative_to(root):
            raise ConfigError(f"{folder} leads out of {root} by a link: remove the link")


def save_record(record: Any, folder: Path) -> None:
    """Write a dataclass as the record of a cell. Raises WriteFailedError as `write_file`."""
    write_text(folder / CELL_FILE, _text(record))


def save_first(record: R, folder: Path) -> R:
    """Write a dataclass as the record of a cell that several processes may run; return the record of the first one.

    Raises WriteFailedError as `write_file`.
    """
    write_shared(folder / CELL_FILE, _text(record).encode(), replace=False)
    return load_record(type(record), folder) or record


def _text(record: Any) -> str:
    return json.dumps(dataclasses.asdict(record), indent=1) + "\n"


def load_record(kind: type[R], folder: Path) -> R | None:
    """Return the record of a cell; None where the cell has not ended.

    Raises ConfigError: the record is damaged.
    """
    path = folder / CELL_FILE
    text = read_if_there(path, refusal=ConfigError)
    try:
        return None if text is None else TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{path} is no record of a cell; remove it, and the cell runs again") from error


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
    """Start a process as a copy of one that has loaded the cell's code, which takes seconds to load.

    Raises RunFailedError: the cell's folder cannot be written.
    """
    try:
        cell.folder.mkdir(parents=True, exist_ok=True)
        log_of(cell).open("a").close()
    except OSError as error:
        raise RunFailedError(f"{cell.folder} cannot be written: {error.strerror}") from error
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


# Choose cells by name, and run them one after another.

T = TypeVar("T")


def pick_named(
    cells: Sequence[T], names: Sequence[str] | None, names_of: Callable[[T], Collection[str]], origin: str
) -> list[T]:
    """Return the cells that go by one of `names`; all for None.

    Raises ConfigError: a name is that of no cell; `origin` is the flag that gave it.
    """
    if names is None:
        return list(cells)
    valid = {name for cell in cells for name in names_of(cell)}
    for name in names:
        if name not in valid:
            raise ConfigError(f"{origin} {name}: there is no such cell; {did_you_mean(name, valid)}")
    return [cell for cell in cells if set(names) & set(names_of(cell))]


def left_to_run(cells: Sequence[T], state: Callable[[T], State], tell: Callable[[str], None]) -> list[T]:
    """Return the cells that are not done, and tell how many are."""
    left = [cell for cell in cells if state(cell) != "done"]
    tell(f"{len(cells) - len(left)} of {len(cells)} cells are done")
    return left


def run_in_turn(cells: Sequence[T], run: Callable[[T], str], tell: Callable[[str], None]) -> None:
    """Run cells one after another.

    `run` returns the result in words. `tell` gets a line before and after each cell, the latter with the time left.
    """
    start = time.monotonic()
    for number, cell in enumerate(cells, 1):
        tell(f"[{number}/{len(cells)}] {cell}")
        result = run(cell)
        left = (time.monotonic() - start) / number * (len(cells) - number)
        tell(f"    {result}; {left:.0f} s to go")


# Shares of work that several processes or jobs do at the same time.


@dataclass(frozen=True)
class Share:
    """One of `count` shares of work that processes or jobs divide."""

    index: int = 0
    count: int = 1

    def order(self, slots: int) -> list[int]:
        """Return the places of all pieces, its own first; the others from the last on, where their owners come late."""
        own = range(self.index, slots, self.count)
        return [*own, *(slot for slot in reversed(range(slots)) if slot not in own)]

    def part(self, index: int, count: int) -> Share:
        """Return one of `count` parts of this share."""
        return Share(self.index + self.count * index, self.count * count)

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"


def parse_share(text: str) -> Share:
    """Read `2/4`, the second of four shares. Raises ConfigError: it is not a share."""
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
        return Share(int(index) - 1, int(count))
    raise ConfigError(f"--share {text}: give a share, such as 2/4 for the second of four")


# The threads of torch, on which the rounding of its sums depends, and the cores for processes.

CONTAINER = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of computing that this container is granted in a period, and the period; not there without one."""


def usable_cores() -> int:
    """Return the cores of this process: those of its task in a SLURM job, else those that it may run on, of which a
    container can grant a share.
    """
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if granted.isdecimal():
        return int(granted)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, period = CONTAINER.read_text().split()
    except OSError:
        return allowed
    return allowed if share == "max" else max(1, min(allowed, int(share) // int(period)))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Set torch's threads inside the block, so that its numbers do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
