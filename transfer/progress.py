"""The progress bar of a run, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Steps done, loss and its parts, learning rate, images a second and the time left.

    The step count moves each step, which costs no synchronisation; the numbers change when a record is
    logged.
    """

    def __init__(self, total: int, *, shown: bool, done: int = 0) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[numbers]}"),
            disable=not (shown and sys.stderr.isatty() and sys.stdout.isatty()),
        )
        self._task = self._bar.add_task("epoch 0", total=total, completed=done, numbers="")

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

    def numbers(self, record: Mapping[str, float]) -> None:
        """Shows a log record: total and parts (layers left out where there are many), lr, images a second."""
        losses = {
            key.removeprefix("train_"): value for key, value in record.items() if key.startswith("train_")
        }
        if len(losses) > 6:
            losses = {name: value for name, value in losses.items() if not name.startswith("layer")}
        text = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        self._bar.update(
            self._task, numbers=f"{text}  lr {record['lr']:.2e}  {record['images_per_second']:.0f} img/s"
        )
