"""Stopping on request: SIGTERM, SIGUSR2 and Ctrl-C become a flag that is read at step boundaries."""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import nullcontext
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from . import deadline, early_signals

logger = logging.getLogger(__name__)

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR2", "SIGINT") if hasattr(signal, name)
)  # Windows has no SIGUSR2


class StopSignals:
    """Handlers for the life of a `with` block; `agreed()` once a step says whether all processes stop now.

    With several processes each boundary starts an all-reduce of the flags on the CPU and reads the one
    started at the boundary before: all see the same value, nothing waits for a device, and the stop comes one
    step later. A second SIGINT aborts at once. The handlers that were there before are put back on exit.
    With `grace`, a process that comes to no boundary in so many seconds after a signal is ended (`deadline`).
    """

    def __init__(self, group: dist.ProcessGroup | None = None, grace: float | None = None) -> None:
        self._watched = nullcontext() if grace is None else deadline.watched(grace)
        self.received: int | None = early_signals.received[-1] if early_signals.received else None
        """The last stop signal that this process got, from before this block too where it was remembered."""
        self._group = group
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}
        self._pending: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        self._watched.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that Python did not install; the default is the nearest thing to it.
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

    def agreed(self) -> int | None:
        """The signal on which all processes stop at this boundary, or None; all must ask at each boundary."""
        deadline.moved()
        if self._group is None:
            return self.received
        flag = torch.tensor(self.received or 0)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        before, self._pending = self._pending, (flag, work)
        if before is None:
            return None
        before[1].wait()
        return int(before[0]) or None
