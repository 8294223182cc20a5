"""When a state is due by the clock: `engine.save_minutes` since the last one."""

from __future__ import annotations

import time


def now() -> float:
    """Seconds of a clock that never goes back."""
    return time.monotonic()


class SaveClock:
    """Asks for a save once so many minutes have passed since the last; never without `minutes`.

    Clocks of processes differ, so that one process asks and all of them agree (`StopSignals.agreed`).
    """

    def __init__(self, minutes: float | None) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        """A state was saved: the minutes count anew."""
        self._since, self._asked = now(), False

    def due(self) -> bool:
        """Whether to ask for a save at this boundary. True once: the answer comes later than the next boundary."""
        if self._seconds is None or self._asked or now() - self._since < self._seconds:
            return False
        self._asked = True
        return True
