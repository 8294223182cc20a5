"""Stopping a run in the middle, as a scheduler does."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from graftvit.transfer.engine.loop import Loop


@contextmanager
def terminated_after(steps: int) -> Iterator[None]:
    """SIGTERM to this process when so many optimizer steps are done; AssertionError if that many never were."""
    taken = 0
    take = Loop._step

    def step(loop: Loop, *given: Any) -> None:
        nonlocal taken
        take(loop, *given)
        taken += 1
        if taken == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(Loop, "_step", step):
        yield
    assert taken == steps, f"the run was over after {taken} steps"
