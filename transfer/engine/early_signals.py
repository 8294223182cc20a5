"""Signals that come before a run can act on them: remembered from the first moment, without torch.

Loading torch and a teacher takes a minute on a busy file system, and a scheduler may say at any time that the job
has to stop. Whoever starts a run calls `remember_signals` first; the run then takes up what has come.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from . import deadline

EARLY_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name)
)  # Windows has no SIGUSR2; Ctrl-C ends a run that has not begun at once
received: list[int] = []
"""The stop signals that this process got so far, in their order."""
_owner: int | None = None  # the process that remembers


@contextmanager
def remembering() -> Iterator[None]:
    """Remembers inside the block, if nothing remembers yet; afterwards the handlers are those of before."""
    if listening() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in EARLY_SIGNALS}
    remember_signals()
    try:
        yield
    finally:
        forget_signals()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def forget_signals() -> None:
    """Nothing has come, and nothing is remembered any more."""
    global _owner
    deadline.stop()
    _owner = None
    received.clear()


def remember_signals(least: float = 0.0) -> None:
    """Installs handlers that remember, and lets the signals through that were blocked until now.

    A process that nothing moves in after one is ended, but not before `least` seconds (`deadline`).
    """
    global _owner
    _owner = os.getpid()
    received.clear()
    for number in EARLY_SIGNALS:
        signal.signal(number, remember)
    deadline.start(least=least)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EARLY_SIGNALS)


def listening() -> bool:
    """Whether this process remembers its signals."""
    return _owner == os.getpid()


def remember(number: int, frame: FrameType | None = None) -> None:
    """A handler that does nothing else; a forked loader process does not remember."""
    if listening():
        received.append(number)
