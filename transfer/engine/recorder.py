"""Write the numbers of a run to log.jsonl, the trackers and the progress bar. Only the first process writes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.tracking import GeneralTracker

from ...models.errors import Json
from ..metrics.table import LAYER
from .progress import ProgressBar
from .runlog import RunLog
from .waiting import Clock

logger = logging.getLogger(__name__)


class Recorder:
    """Add the times of the clock to each record and pass it on."""

    def __init__(
        self, log: RunLog, trackers: list[GeneralTracker], bar: ProgressBar, *, writes: bool
    ) -> None:
        self.log = log
        self._trackers = trackers
        self._bar = bar
        self._writes = writes
        self._clocks: dict[str, Clock] = {}
        self.communication: Callable[[], float | None] = lambda: None
        """Return the seconds of exposed communication of a step timed since the last call, or None."""

    def start(self, kind: str) -> None:
        """Start the clock of `kind` (interval or epoch)."""
        self._clocks[kind] = Clock()

    def images(self, count: int) -> None:
        """Count the images of a step, over all processes."""
        for clock in self._clocks.values():
            clock.images += count

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clocks inside the block: evaluating and saving are not training."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            for clock in self._clocks.values():
                clock.start += time.perf_counter() - begin

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the block as waiting for the loader."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            for clock in self._clocks.values():
                clock.waited += time.perf_counter() - begin

    def step(self, done: int, epoch: int) -> None:
        """Note that a step is done."""
        for clock in self._clocks.values():
            clock.steps += 1
        self._bar.step(done, epoch)

    def write(self, kind: str, record: Json) -> None:
        """Write a record with the readings of its clock (`Clock.readings`), and restart the clock."""
        exposed = self.communication()
        for clock in self._clocks.values():
            clock.exposed += [] if exposed is None else [exposed]
        full = {**record, **self._clocks[kind].readings()}
        self.start(kind)
        self.plain(full)
        if kind == "interval":
            self._bar.show(full)

    def plain(self, record: Json) -> None:
        """Write a record unchanged."""
        if not self._writes:
            return
        self.log.append(record)
        shown = {
            key: value for key, value in record.items() if not (key.startswith("test_") and LAYER in key)
        }
        logger.info("%s", "  ".join(f"{key} {_short(value)}" for key, value in shown.items()))
        for tracker in self._trackers:
            tracker.log(
                {key: value for key, value in record.items() if key != "step"}, step=int(record["step"])
            )

    def describe(self, hyperparameters: Json) -> None:
        """Send the settings of the run to the trackers."""
        for tracker in self._trackers:
            tracker.store_init_configuration(dict(hyperparameters))

    def finish(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.finish()


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the most memory of a GPU, in GiB, that tensors held at once in this process; empty on a CPU."""
    if device.type != "cuda":
        return {}
    return {"peak_memory_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3)}


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
