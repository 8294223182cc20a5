"""The commands besides runs that `graftvit submit` gives to a cluster, and what it must know of them.

A command is one more name in `SUBMITTED`, and a function `check(argv, here)` in its module, which raises what is wrong
with its words and returns its `Work`. It has no state to save: a job that is started again begins anew.
"""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..transfer.engine import early_signals

SUBMITTED = ("evaluate", "data", "convert", "export", "layers", "benchmark")


@dataclass(frozen=True)
class Work:
    """What a command is asked for."""

    output: Path | None = None
    """The file or folder that it writes; None where it only prints."""
    workers: int = 0
    """Loader processes, which want a core each."""


def check_words(command: str, words: Sequence[str], *, here: bool = True) -> Work:
    """Parses and checks the words of a command, and does nothing.

    `here` says that models and data sets are to be found on this machine, too. Raises GraftError as the command would.
    """
    check: Callable[..., Work] = importlib.import_module(f".commands.{command}", __package__).check
    return check(list(words), here=here)


class Interrupted(BaseException):
    """A job was told to stop while a command ran that saves nothing."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside the block, a stop signal ends the command at once, where a job listens to them. Raises Interrupted."""
    if not early_signals.listening() or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        early_signals.remember(number, frame)
        if early_signals.listening():  # a forked loader process is its parent's to end
            raise Interrupted(number)

    before = {number: signal.signal(number, end) for number in early_signals.EARLY_SIGNALS}
    try:
        if early_signals.received:
            raise Interrupted(early_signals.received[-1])
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
