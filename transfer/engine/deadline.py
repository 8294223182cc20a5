"""End a process that hangs after a stop signal, without torch.

A run acts on a stop signal at a step boundary, where it can be saved. A process that waits for a disk, a data worker or
another process may never reach one, and Python runs no signal handlers inside a library call. So the system writes
each signal into a socket, and a thread that reads the socket ends the process after a time without progress. States
are written atomically, so saved states stay intact.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

GRACE = 300.0
"""Seconds without progress after a signal until the process ends; `engine.stop_grace`."""
SECOND = 5.0
"""Seconds for a second Ctrl-C to end the process in Python's own way."""
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR2", "SIGHUP", "SIGINT") if hasattr(signal, name)
)  # Windows has no SIGUSR2 and no SIGHUP


class Watch(threading.Thread):
    """A thread that ends the process after a stop signal and `grace` seconds without progress."""

    def __init__(self, grace: float, least: float = 0.0) -> None:
        super().__init__(name="graftvit-deadline", daemon=True)
        self.owner = os.getpid()
        self.least = least
        self.grace = max(grace, least)
        self._since: float | None = None
        self._limit = float("inf")
        self._number = 0
        self._interrupts = 0
        self._reads, self._writes = socket.socketpair()
        self._writes.setblocking(False)
        self._before = signal.set_wakeup_fd(self._writes.fileno(), warn_on_full_buffer=False)

    def moved(self) -> None:
        """Restart the time, because the process made progress."""
        if self._since is not None:
            self._since = time.monotonic()

    def clear(self) -> None:
        """Forget the signals received so far."""
        self._since, self._limit, self._interrupts = None, float("inf"), 0

    def close(self) -> None:
        """Stop the watch. Call it only in the main thread."""
        signal.set_wakeup_fd(self._before)
        self.clear()
        self._writes.send(b"\0")
        self.join()
        self._reads.close()
        self._writes.close()

    def run(self) -> None:
        """Run the thread."""
        while True:
            left = self._left()
            if left is not None and left <= 0:
                self._end()
            if select.select([self._reads], [], [], left)[0]:
                came = self._reads.recv(512)
                if 0 in came:
                    return
                for number in came:
                    self._note(number)

    def _note(self, number: int) -> None:
        if number not in SIGNALS:
            return
        now = time.monotonic()
        self._number = number
        self._since = self._since or now
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._limit = min(self._limit, now + SECOND)

    def _left(self) -> float | None:
        since = self._since
        return None if since is None else min(since + self.grace, self._limit) - time.monotonic()

    def _end(self) -> None:
        """Kill the data workers, then exit without clean-up, which might also hang."""
        rank = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        why = f"and nothing moved in the {self.grace:g} seconds after it (engine.stop_grace)"
        if self._limit < float("inf"):
            why = "twice"
        name = signal.Signals(self._number).name
        os.write(2, f"graftvit: {rank}{name} came {why}: this process ends; what was saved stays\n".encode())
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(128 + self._number)


_watch: Watch | None = None


def current() -> Watch | None:
    """Return the watch of this process; None in a forked process."""
    return _watch if _watch is not None and _watch.owner == os.getpid() else None


def start(grace: float = GRACE, least: float = 0.0) -> None:
    """Start the watch, with at least `least` seconds of grace whatever the settings of a run say."""
    global _watch
    stop()
    _watch = Watch(grace, least)
    _watch.start()


def stop() -> None:
    """Stop the watch."""
    global _watch
    watch, _watch = current(), None
    if watch is not None:
        watch.close()


@contextmanager
def watched(grace: float) -> Iterator[None]:
    """End the process, inside the block, after a signal and `grace` seconds without progress.

    Use the watch that is already running, if any, and leave it running afterwards.
    """
    watch = current()
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python delivers signals only to the main thread
        yield
    elif watch is None:
        start(grace)
        try:
            yield
        finally:
            stop()
    else:
        before, watch.grace = watch.grace, max(grace, watch.least)
        try:
            yield
        finally:
            watch.grace = before


def moved() -> None:
    """Note that a step, or a batch of an evaluation, is done."""
    watch = current()
    if watch is not None:
        watch.moved()


def clear() -> None:
    """Note that the received signals were handled."""
    watch = current()
    if watch is not None:
        watch.clear()


def heard(numbers: Iterable[int]) -> list[int]:
    """Return the signals that a run acts on: not SIGHUP where `nohup` has it ignored."""
    hang_up = getattr(signal, "SIGHUP", None)
    return [number for number in numbers if number != hang_up or signal.getsignal(number) != signal.SIG_IGN]


def _forget_in_a_fork() -> None:
    """Keep a forked loader worker from reporting its signals to its parent."""
    if _watch is not None:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_a_fork)
