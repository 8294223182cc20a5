"""Measure how long a process waits: the clock of a record, and the exposed gradient communication of DDP."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import nn

from ...models.errors import JsonDict

NANOSECONDS = 1e-9


@dataclass
class Clock:
    """Times and counts since the last record of a kind, by the clock of this process."""

    start: float = field(default_factory=lambda: time.perf_counter())
    images: int = 0
    steps: int = 0
    waited: float = 0.0
    """Seconds without a batch from the loader."""
    exposed: list[float] = field(default_factory=list)
    """Seconds of communication after the backward pass, in the steps that were timed."""

    def readings(self) -> dict[str, float]:
        """Return the seconds, and unless no step was timed, images per second and the shares of time spent waiting."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        readings = {"seconds": round(seconds, 3)}
        if self.steps:
            readings["images_per_second"] = round(self.images / seconds, 1)
            readings["data_wait"] = round(min(1.0, self.waited / seconds), 3)
        if self.exposed and self.steps:
            share = sum(self.exposed) / len(self.exposed) * self.steps / seconds
            readings["comm_wait"] = round(min(1.0, share), 3)
        return readings


class CommunicationTimer:
    """DDP's own timing of a step: how long its gradient exchange continued after the backward pass.

    DDP times its first ten steps and then one in `every`. It reads the times from the device at the start of the next
    step; if `every` is the interval of the log, the log has waited for the device there anyway. FSDP and a single
    process have no such times.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        self._model = model
        self._seen = 0
        choose = getattr(model, "_set_ddp_runtime_logging_sample_rate", None)
        if choose is not None:
            choose(every)

    def seconds(self) -> float | None:
        """Return the seconds of the last timed step; None if no step was timed since the last call."""
        read = getattr(self._model, "_get_ddp_logging_data", None)
        timed: JsonDict = {} if read is None else read()
        total, hidden = timed.get("backward_comm_time"), timed.get("backward_compute_comm_overlap_time")
        step = timed.get("iteration", 0)
        if total is None or hidden is None or step == self._seen:
            return None
        self._seen = step
        return float(max(0, total - hidden)) * NANOSECONDS
