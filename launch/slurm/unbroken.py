"""The moment between the order to the scheduler and its number, which no signal may cut."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ...models.errors import GraftError
from ..hints import hint

HELD = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


class InterruptedSubmissionError(GraftError):
    """A job that was submitted all the same; the exit code is the signal's."""

    def __init__(self, number: int, job: str, folder: Path) -> None:
        self.exit_code = 128 + number
        super().__init__(
            f"{signal.Signals(number).name} came while job {job} was being submitted, and it was: "
            f"`{hint('stop', folder)}` ends it"
        )


@contextmanager
def unbroken() -> Iterator[list[int]]:
    """Lets signals that would end this process wait; yields those that came.

    Handlers, and no mask: a child would keep the mask for life. One that was told to ignore a signal goes on to.
    """
    came: list[int] = []

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
