"""What a soak has seen, and what must not be among it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "TIMEOUT")
GRACE = 90.0
"""Seconds that a job may take to end which was told to."""


@dataclass(frozen=True)
class Job:
    """A line of the queue."""

    number: str
    state: str
    folder: str
    """The run folder, from the place of its logs."""
    restarts: int

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass
class Ledger:
    """Shared by the shells, the troubles and the watch over the queue."""

    path: Path
    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    told_to_end: dict[str, float] = field(default_factory=dict)
    """Job -> when `graftvit jobs stop` said that it ends."""
    jobs: dict[str, Job] = field(default_factory=dict)
    """Job -> as it was seen last."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _begun: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def note(self, what: str, **more: Any) -> None:
        """One event, counted by its first word, in the file and on the screen."""
        with self._lock:
            self.counts[what] += 1
            line = {"second": round(self.seconds, 1), "what": what, **more}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            details = "  ".join(f"{key}={value}" for key, value in more.items())
            print(f"{self.seconds:7.1f} s  {what:<12} {details}"[:200], flush=True)

    def fault(self, sentence: str) -> None:
        with self._lock:
            known = sentence in self.faults
            if not known:
                self.faults.append(sentence)
        if not known:
            self.note("FAULT", sentence=sentence)

    def told(self, jobs: Iterable[str]) -> None:
        with self._lock:
            for job in jobs:
                self.told_to_end.setdefault(job, time.monotonic())

    def see(self, jobs: Iterable[Job]) -> None:
        """The queue at this moment."""
        now = time.monotonic()
        for job in jobs:
            self.jobs[job.number] = job
            told = self.told_to_end.get(job.number)
            if told is not None and now - told > GRACE and not job.ended:
                self.fault(f"job {job.number} of {job.folder} was told to end and is {job.state}")
        alive = Counter(job.folder for job in self.jobs.values() if not job.ended)
        for folder, count in alive.items():
            if count > 1:
                numbers = [job.number for job in self.jobs.values() if job.folder == folder and not job.ended]
                self.fault(f"{folder} has {count} jobs at a time: {', '.join(numbers)}")
