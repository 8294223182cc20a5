"""The demo: a teacher without labels, students with few, and a report of what its attention was worth."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ...models.errors import GraftError
from ..engine.train import RunResult, train
from . import report_text as text
from .measure import measure
from .parts import Part, demo_parts
from .report import write_report
from .results import DemoResults

SEEDS = (0, 1, 2)


class DemoStoppedError(GraftError):
    """A signal ended the demo between two steps; what was done is saved."""

    def __init__(self, number: int, done: int, parts: int) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name} with {done} of {parts} runs finished and the current one saved; "
            "the same command goes on from there"
        )
        self.exit_code = 128 + number


def run_demo(
    output_dir: Path, quick: bool = False, *, seeds: Sequence[int] | None = None, progress: bool = True
) -> Path:
    """Trains teacher and students, compares them, and writes the report; returns the path of `report.html`.

    Runs that are finished are not run again, and one that was interrupted goes on where it was saved.

    Args:
        output_dir: Gets `report.html`, `report.md`, `images/` and the run folders.
        quick: One seed, and 40 % of the teacher's training.
        seeds: 0, 1, 2 by default, and 0 alone for a quick demo.
        progress: Show the runs, their progress and the table on standard output.

    Raises:
        DemoStoppedError: on SIGINT, SIGTERM or SIGUSR2, after saving.
    """
    # Absolute, so that a run goes on wherever the command is given next time.
    parts = demo_parts(output_dir.resolve(), seeds or (SEEDS[:1] if quick else SEEDS), quick)
    console = Console(quiet=not progress)
    with _quiet_log(), _one_thread():
        for index, part in enumerate(parts):
            console.print(f"[bold]{index + 1}/{len(parts)}[/bold] {part}", highlight=False)
            result = _run(part, index, len(parts), progress)
            console.print(f"    {_outcome(result)}", highlight=False)
        results = measure(parts, quick)
    report = write_report(results, output_dir)
    console.print(_table(results))
    return report


def _run(part: Part, done: int, parts: int, progress: bool) -> RunResult:
    """One run to its end."""
    engine = part.config.engine.model_copy(update={"progress": progress})
    try:
        result = train(part.config.model_copy(update={"engine": engine}))
    except KeyboardInterrupt as interrupt:
        raise DemoStoppedError(signal.SIGINT, done, parts) from interrupt
    if result.signal is not None:
        raise DemoStoppedError(result.signal, done, parts)
    return result


def _outcome(result: RunResult) -> str:
    top1 = result.metrics.get("test_top1")
    return f"{result.steps} steps" + ("" if top1 is None else f", top-1 {top1:.1f} %")


def _table(results: DemoResults) -> Table:
    """The report's table for a terminal."""
    table = Table(
        title=text.TITLE, caption=f"top-1 on {results.test_images} test images, {results.labels} labels"
    )
    table.add_column("method")
    table.add_column("top-1", justify="right")
    table.add_column("against scratch", justify="right")
    for method in results.methods:
        table.add_row(method.title, text.percent(method), text.against_scratch(results, method.name))
    return table


@contextmanager
def _quiet_log() -> Iterator[None]:
    """The runs' own records stay in their log.jsonl: the demo says what they came to in a line each."""
    levels = {"graftvit": logging.WARNING, "graftvit.transfer.engine.train": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second core, and results then do not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
