"""Where the numbers of a run go: log.jsonl, the trackers, the progress bar. Only the first process writes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate.tracking import GeneralTracker

from .progress import ProgressBar
from .runlog import RunLog

logger = logging.getLogger(__name__)


class Recorder:
    """Adds the clock to each record and passes it on."""

    def __init__(
        self, log: RunLog, trackers: list[GeneralTracker], bar: ProgressBar, *, writes: bool
    ) -> None:
        self.log = log
        self._trackers = trackers
        self._bar = bar
        self._writes = writes
        self._since: dict[str, tuple[float, int]] = {}

    def start(self, kind: str) -> None:
        """The clock of `kind` (interval or epoch) starts now."""
        self._since[kind] = (time.perf_counter(), 0)

    def images(self, count: int) -> None:
        """`count` more images, of all processes, went through a step."""
        self._since = {kind: (start, seen + count) for kind, (start, seen) in self._since.items()}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the clocks stand still: evaluating and saving are not training."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            gone = time.perf_counter() - begin
            self._since = {kind: (start + gone, seen) for kind, (start, seen) in self._since.items()}

    def step(self, done: int, epoch: int) -> None:
        """A step is behind."""
        self._bar.step(done, epoch)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """One record, with the seconds of its clock and the images a second; the clock starts again."""
        start, seen = self._since[kind]
        seconds = time.perf_counter() - start
        full = {
            **record,
            "seconds": round(seconds, 3),
            "images_per_second": round(seen / max(seconds, 1e-9), 1),
        }
        self.start(kind)
        self.plain(full)
        if kind == "interval":
            self._bar.show(full)

    def plain(self, record: Mapping[str, Any]) -> None:
        """One record as it is."""
        if not self._writes:
            return
        self.log.append(record)
        logger.info("%s", "  ".join(f"{key} {_short(value)}" for key, value in record.items()))
        for tracker in self._trackers:
            tracker.log(
                {key: value for key, value in record.items() if key != "step"}, step=int(record["step"])
            )

    def describe(self, hyperparameters: Mapping[str, Any]) -> None:
        """Tells the trackers the settings of the run."""
        for tracker in self._trackers:
            tracker.store_init_configuration(dict(hyperparameters))

    def finish(self) -> None:
        """Closes the trackers."""
        for tracker in self._trackers:
            tracker.finish()


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
