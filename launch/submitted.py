"""The commands other than runs that `graftvit submit` can submit to a cluster.

To add a command, add its name to `SUBMITTED` and a function `check(argv, here)` to its module. The function checks the
arguments, raises their errors and returns the `Work`. These commands save no state: a restarted job starts from the
beginning, except for what `convert`, `hybrid` and `programs search` keep.
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
from typing import TYPE_CHECKING

from ..transfer.engine import early_signals
from ..transfer.engine.deadline import heard

if TYPE_CHECKING:
    from ..transfer.config import DataConfig

SUBMITTED = ("evaluate", "data", "convert", "export", "deploy", "hybrid", "benchmark", "programs")


def command_name(words: Sequence[str]) -> str:
    """Return the command that words begin with, and its action: `evaluate`, `programs search`."""
    names = words[: 2 if words[0] == "programs" else 1]
    return " ".join(name for name in names if not name.startswith("-"))


@dataclass(frozen=True)
class Work:
    """What a submitted command writes and needs."""

    output: Path | None = None
    """The file or folder that the command writes; None if it only prints."""
    workers: int = 0
    """Number of loader processes; each needs a core."""
    divisible: bool = False
    """The command takes `--share I/N`, so that the jobs of an array can divide its work."""


def check_words(command: str, words: Sequence[str], *, here: bool = True) -> Work:
    """Parse and check the arguments of a command without running it.

    With `here`, models and data sets must be on this machine. Raises the GraftError that the command would raise.
    """
    check: Callable[..., Work] = importlib.import_module(f".commands.{command}", __package__).check
    return check(list(words), here=here)


def check_here(*sources: str, data: DataConfig | None = None) -> None:
    """Raise the GraftError of a source or of a data set that is not on this machine."""
    from ..checkpoints.sources import parse_source
    from ..transfer.data.datasets import check_dataset

    for source in sources:
        parse_source(source)
    if data is not None and not data.download:
        check_dataset(data)


def check_data(data: DataConfig) -> None:
    """Raise the GraftError of a data set of any task that is not on this machine."""
    from ..transfer.data.dense_sets import DENSE_SETS, check_dense

    if data.dataset in DENSE_SETS:
        check_dense(data, (data.val_split,))
    else:
        check_here(data=data)


class Interrupted(BaseException):
    """A job received a stop signal while it ran a command that saves no state."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """End the command at the first stop signal inside the block, if the job listens to signals. Raises Interrupted."""
    if not early_signals.listening() or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        early_signals.remember(number, frame)
        if early_signals.listening():  # a forked loader process is ended by its parent
            raise Interrupted(number)

    before = {number: signal.signal(number, end) for number in heard(early_signals.EARLY_SIGNALS)}
    try:
        if early_signals.received:
            raise Interrupted(early_signals.received[-1])
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
