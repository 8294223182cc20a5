"""Tell a command of the site what happens to a run: mail, a web hook or a gauge without code of ours.

The command of `on_event` in the site file gets one JSON object on its standard input:

    {"event": "failure", "run": "/scratch/me/distill", "job_id": "1234", "attempt": 2, "restart": 1, "nodes": ["n1"],
     "why": "rank 3: ValueError: ...", "step": 4100, "total_steps": 62500, "time": 1764090000.0}

Events are start, restart, failure, finish, stop, and stall: no progress for `event_minutes`. What becomes of the
command changes nothing in the run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .folder import JobFolder
from .jobs import read_progress

TIMEOUT = 60.0
"""Seconds that the command may take."""
POLL = 20.0
"""Seconds between two looks at the progress."""


def tell(files: JobFolder, event: str, resources: Mapping[str, Any], **known: Any) -> None:
    """Run the command of `on_event`, where there is one, with what is known about the run."""
    command = resources.get("on_event")
    if not command:
        return
    progress = read_progress(files.output_dir)
    said = {
        "event": event, "run": str(files.output_dir), **known, "step": progress.step,
        "total_steps": progress.total_steps, "time": time.time(),
    }  # fmt: skip
    try:
        done = subprocess.run(
            ["sh", "-c", command],
            input=json.dumps(said) + "\n",
            text=True,
            capture_output=True,
            timeout=TIMEOUT,
        )
        problem = f"exit code {done.returncode}: {done.stderr.strip()[-200:]}" if done.returncode else ""
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    if problem:
        sys.stderr.write(f"graftvit: on_event ({event}): {problem}\n")


@dataclass
class StallWatch:
    """Tell once of each time without progress, from a thread of the first rank."""

    files: JobFolder
    resources: Mapping[str, Any]
    known: Mapping[str, Any]
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> None:
        if self.resources.get("on_event"):
            threading.Thread(target=self._watch, name="stall watch", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        seen, since, told = -1, time.monotonic(), False
        while not self._over.wait(POLL):
            step = read_progress(self.files.output_dir).step
            if step != seen:
                seen, since, told = step, time.monotonic(), False
            elif not told and time.monotonic() - since >= 60 * int(self.resources.get("event_minutes", 30)):
                told = True
                tell(self.files, "stall", self.resources, **self.known)
