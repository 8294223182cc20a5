"""Agree between all processes, at a step boundary, to stop (after SIGTERM, SIGUSR2, SIGHUP or Ctrl-C) or to save."""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import nullcontext
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from . import deadline, early_signals

logger = logging.getLogger(__name__)


class Agreed(NamedTuple):
    """The decision of all processes at a boundary."""

    signal: int | None
    """The signal that stops them."""
    save: bool
    """True if a state is due by the clock."""


class StopSignals:
    """Signal handlers inside a `with` block; call `agreed()` once a step to learn whether all processes stop or save.

    With several processes, each boundary starts an all-reduce of the flags on the CPU and reads the one started at the
    boundary before: all see the same values, nothing waits for a device, and a stop or save happens one step later. A
    second SIGINT aborts immediately. The previous handlers are restored on exit.
    With `grace`, a process without progress for so many seconds after a signal is ended (`deadline`).
    """

    def __init__(self, group: dist.ProcessGroup | None = None, grace: float | None = None) -> None:
        self._watched = nullcontext() if grace is None else deadline.watched(grace)
        self.received: int | None = early_signals.received[-1] if early_signals.received else None
        """The last stop signal of this process, also one remembered from before this block."""
        self._group = group
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}
        self._pending: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers
            for number in deadline.heard(deadline.SIGNALS):
                self._before[number] = signal.signal(number, self._handle)
        self._watched.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None means a handler that Python did not install; the default handler is the closest replacement.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._watched.__exit__(kind, error, trace)
        if kind is None and self._pending is not None:
            self._pending[1].wait()  # after an error the others may be gone, and waiting would hang

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a forked loader worker: the process that owns the run decides
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.default_int_handler(number, frame)
        logger.warning("%s received: saving at the next step, then stopping", signal.Signals(number).name)
        self.received = number
        early_signals.remember(number)

    def agreed(self, *, save: bool = False) -> Agreed:
        """Return what all processes do at this boundary; all must call it at each one.

        `save`: a state is due according to this process.
        """
        deadline.moved()
        if self._group is None:
            return Agreed(self.received, save)
        flags = torch.tensor([self.received or 0, save])
        work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        before, self._pending = self._pending, (flags, work)
        if before is None:
            return Agreed(None, False)
        before[1].wait()
        number, due = before[0].tolist()
        return Agreed(number or None, bool(due))
