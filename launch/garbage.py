"""What a process of this package does with objects that are no longer needed."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable


def collect_seldom() -> None:
    """Let this process search for garbage seldom.

    To import torch and timm makes a million objects and no garbage: searching them takes as long as the imports.
    """
    gc.set_threshold(20_000, 20, 20)


def without_clearing(run: Callable[[], int]) -> int:
    """Return the exit code of `run`, and end this process with it as soon as it has nothing left to do.

    Python waits for all threads and runs the functions of `atexit`. Then it would clear a million objects one by one,
    for a second; the system frees their memory at once. After an error that `run` raises, Python ends as always.
    """
    codes: list[int] = []
    atexit.register(_end, codes)  # the first that is registered runs last
    codes.append(run())
    return codes[0]


def _end(codes: list[int]) -> None:
    if not codes:
        return
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except (OSError, ValueError):
        return  # Python tells of it
    os._exit(codes[0])
