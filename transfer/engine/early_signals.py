"""Remember signals that arrive before a run can handle them, without torch.

Loading torch and a teacher takes a minute on a busy file system, and a scheduler may stop the job at any time. A
command that starts a run calls `remember_signals` first; the run then handles the remembered signals.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from . import deadline

EARLY_SIGNALS = tuple(number for number in deadline.SIGNALS if number != signal.SIGINT)
"""Ctrl-C ends a run that has not started immediately."""
received: list[int] = []
"""The stop signals that this process received so far, in order."""
_owner: int | None = None  # the process that remembers


@contextmanager
def remembering() -> Iterator[None]:
    """Remember signals inside the block, unless this is already done; then restore the handlers."""
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
    """Clear the received signals and stop remembering."""
    global _owner
    deadline.stop()
    _owner = None
    received.clear()


def remember_signals(least: float = 0.0) -> None:
    """Install handlers that remember signals, and unblock signals that were blocked until now.

    A process without progress after a signal is ended, but not before `least` seconds (`deadline`).
    """
    global _owner
    _owner = os.getpid()
    received.clear()
    for number in deadline.heard(EARLY_SIGNALS):
        signal.signal(number, remember)
    deadline.start(least=least)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EARLY_SIGNALS)


def listening() -> bool:
    """Return whether this process remembers its signals."""
    return _owner == os.getpid()


def remember(number: int, frame: FrameType | None = None) -> None:
    """Remember a signal (a handler); do nothing in a forked loader process."""
    if listening():
        received.append(number)
