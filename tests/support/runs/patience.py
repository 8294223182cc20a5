"""Waiting for what other processes do: on a busy machine too, and no longer than it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
PATIENCE = 900.0
"""Seconds until a test gives up; only a test that fails waits so long."""


def until(ready: Callable[[], Result], what: str | Callable[[], object], every: float = 0.05) -> Result:
    """The first true result of `ready`, asked `every` seconds.

    Raises:
        AssertionError: `what` (if callable, what it then returns) does not come.
    """
    end = time.monotonic() + PATIENCE
    while not (result := ready()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {PATIENCE:.0f} s: {what() if callable(what) else what}")
        time.sleep(every)
    return result
