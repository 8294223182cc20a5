"""The states that a run keeps: last, the one before it, and the best."""

from __future__ import annotations

import logging
from pathlib import Path

from ..models.errors import CheckpointError
from .atomic import sync
from .state_file import TrainingState, check_state, read_state, write_state

__all__ = ["StateFolder", "TrainingState", "read_state", "write_state"]

logger = logging.getLogger(__name__)


class StateFolder:
    """`last`, `previous` and `best` in one folder; at any moment at least one whole state is there.

    `save` first writes the new state in full under another name, then renames `last` to `previous` and
    the new one to `last`. A `last` that is not known to be whole never takes the place of `previous`.
    One process saves at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last = folder / "last.safetensors"
        self.previous = folder / "previous.safetensors"
        self.best = folder / "best.safetensors"
        self._incoming = folder / "incoming.safetensors"
        self._last_is_whole = False

    def save(self, state: TrainingState) -> None:
        """Writes `last`; the one before becomes `previous`.

        Raises CheckpointError (exit code 1) on a full disk, with the states that were there intact.
        """
        if not self._last_is_whole:
            self._last_is_whole = _is_whole(self.last)
        write_state(self._incoming, state)
        if self._last_is_whole:
            self.last.replace(self.previous)
        self._incoming.replace(self.last)
        sync(self.folder)
        self._last_is_whole = True

    def save_best(self, state: TrainingState) -> None:
        """Writes `best`. Raises as `save`."""
        write_state(self.best, state)

    def load(self) -> TrainingState | None:
        """`last`, else `previous` with a warning that names the damaged file; None where there is no state.

        Raises CheckpointError where there are states and all are damaged.
        """
        damaged: list[str] = []
        # A process that died between the two renames leaves the newest whole state under the third name.
        for path in (self.last, self._incoming, self.previous):
            if not path.exists():
                continue
            try:
                state = read_state(path)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            self._last_is_whole = path == self.last
            if damaged:
                logger.warning("%s; going on from %s", "; ".join(damaged), path)
            return state
        if damaged:
            raise CheckpointError(
                f"no whole state is left in {self.folder} ({'; '.join(damaged)}): "
                "move the folder away to start again"
            )
        return None


def _is_whole(path: Path) -> bool:
    try:
        check_state(path)
    except CheckpointError:
        return False
    return True
