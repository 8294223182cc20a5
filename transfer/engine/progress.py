"""The progress bar of a run, on a terminal only."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from types import TracebackType

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

SHOWN_PARTS = 6
"""With more losses than these, those of single layers are left to the log."""
NOTABLE_WAIT = 0.1
"""Share of the time spent waiting for data above which the line says so."""


class TwoLines(Progress):
    """The bar, and a line of numbers under it: together they are too wide for most terminals."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.numbers, style="dim")


class ProgressBar:
    """Steps done and the time left; below, the losses, learning rate and images a second.

    The step count moves each step, which costs no synchronisation; the numbers when a record is logged.
    """

    def __init__(self, total: int, *, shown: bool, done: int = 0) -> None:
        self._bar = TwoLines(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            disable=not (shown and sys.stdout.isatty()),
        )
        self._task = self._bar.add_task("epoch 0", total=total, completed=done)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, done: int, epoch: int) -> None:
        """`done` optimiser steps are behind."""
        self._bar.update(self._task, completed=done, description=f"epoch {epoch}")

    def show(self, record: Mapping[str, float]) -> None:
        """Shows the numbers of a log record."""
        self._bar.numbers = numbers(record)


LAYER = re.compile(r"(.*\.)?layer\d+")
"""Name of the loss of one layer."""


def numbers(record: Mapping[str, float]) -> str:
    """The line under the bar: losses, learning rate, images a second, a wait for data that is worth a look."""
    losses = {key.removeprefix("train_"): value for key, value in record.items() if key.startswith("train_")}
    if len(losses) > SHOWN_PARTS:
        losses = {name: value for name, value in losses.items() if not LAYER.fullmatch(name)}
    text = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
    text = f"{text}  lr {record['lr']:.2e}  {record['images_per_second']:.0f} img/s"
    waiting = record.get("data_wait", 0.0)
    return f"{text}  {waiting:.0%} waiting for data" if waiting > NOTABLE_WAIT else text
