"""Bound the memory and the work of a test: an allocation of a lying size fails, instead of succeeding lazily."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class EndlessError(BaseException):
    """More seconds of processor time than a block may take."""


def held_bytes() -> int:
    """Return the address space that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextmanager
def limited_memory(room: int) -> Iterator[None]:
    """Let the process take at most `room` bytes beyond what it holds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held_bytes() + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def limited_work(seconds: float) -> Iterator[None]:
    """Raise EndlessError after so much processor time: a busy machine does not count."""
    before = signal.signal(signal.SIGPROF, _end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _end(*_: object) -> None:
    raise EndlessError
