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
"""With more losses, the losses of single layers appear only in the log."""
NOTABLE_WAIT = 0.1
"""The share of time spent waiting for data above which the line shows it."""


class TwoLines(Progress):
    """The bar, and the numbers on a second line, because one line would be too wide for most terminals."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.numbers, style="dim")


class ProgressBar:
    """Steps done and time left; below, losses, learning rate and images per second.

    The step count changes with each step, without synchronization; the numbers change with each log record.
    """

    def __init__(self, total: int, *, shown: bool, done: int = 0, name: str = "epoch 0") -> None:
        self._bar = TwoLines(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            disable=not (shown and sys.stdout.isatty()),
        )
        self._task = self._bar.add_task(name, total=total, completed=done)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, done: int, epoch: int) -> None:
        """Show that `done` optimizer steps are done."""
        self._bar.update(self._task, completed=done, description=f"epoch {epoch}")

    def advance(self, count: int) -> None:
        """Show that `count` more are done."""
        self._bar.advance(self._task, count)

    def show(self, record: Mapping[str, float]) -> None:
        """Show the numbers of a log record."""
        self._bar.numbers = numbers(record)


LAYER = re.compile(r"(.*\.)?layer\d+")
"""Name of the loss of one layer."""


def numbers(record: Mapping[str, float]) -> str:
    """Return the line under the bar: losses, learning rate, images per second, and a long wait for data."""
    losses = {key.removeprefix("train_"): value for key, value in record.items() if key.startswith("train_")}
    if len(losses) > SHOWN_PARTS:
        losses = {name: value for name, value in losses.items() if not LAYER.fullmatch(name)}
    text = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
    text = f"{text}  lr {record['lr']:.2e}  {record['images_per_second']:.0f} img/s"
    waiting = record.get("data_wait", 0.0)
    return f"{text}  {waiting:.0%} waiting for data" if waiting > NOTABLE_WAIT else text
