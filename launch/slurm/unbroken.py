"""Signals while something is submitted: before the order to the scheduler, and between that and its number."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ...models.errors import GraftError
from ..hints import hint

_orders: list[bool] = []
"""One for each that this process may have given to a scheduler."""
HELD = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


class InterruptedSubmissionError(GraftError):
    """A job that was submitted all the same; the exit code is the signal's."""

    def __init__(self, number: int, job: str, folder: Path) -> None:
        self.exit_code = 128 + number
        super().__init__(
            f"{signal.Signals(number).name} came while job {job} was being submitted, and it was: "
            f"`{hint('stop', folder)}` ends it"
        )


class NothingSubmittedError(GraftError):
    """Somebody has stopped a submission in time; the exit code is the signal's."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {name}: nothing was submitted")


class _Told(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Says that nothing was submitted where Ctrl-C or SIGTERM ends the block before the first order.

    Raises NothingSubmittedError.
    """
    if threading.current_thread() is not threading.main_thread():  # no other one may have handlers
        yield
        return
    _orders.clear()
    before = signal.getsignal(signal.SIGTERM)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _tell)
    try:
        yield
    except (KeyboardInterrupt, _Told) as told:
        if _orders:
            raise
        raise NothingSubmittedError(signal.SIGTERM if isinstance(told, _Told) else signal.SIGINT) from told
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(number: int, frame: FrameType | None) -> None:
    if not _orders:
        raise _Told
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def ordering() -> None:
    """From here on, something may have been submitted."""
    _orders.append(True)


@contextmanager
def unbroken() -> Iterator[list[int]]:
    """Lets signals that would end this process wait; yields those that came.

    Handlers, and no mask: a child would keep the mask for life. One that was told to ignore a signal goes on to.
    """
    came: list[int] = []
    ordering()

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    if threading.current_thread() is not threading.main_thread():  # no other one may have handlers
        yield came
        return
    before = {number: signal.getsignal(number) for number in HELD}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, remember)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
