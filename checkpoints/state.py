"""Keep the states of a run: the last, the one before it, and the best."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from ..models.errors import CheckpointError, JsonDict
from .atomic import remove, sync
from .state_file import BEST, TrainingState, check_state, read_meta, read_state, write_state

__all__ = ["StateFolder", "TrainingState", "read_state", "write_state"]

logger = logging.getLogger(__name__)


class StateFolder:
    """`last`, `previous` and `best` in one folder; at any moment at least one whole state is there.

    `save` first writes the new state in full under another name, then renames `last` to `previous` and
    the new one to `last`. A `last` that is not known to be whole never takes the place of `previous`.
    One process saves at a time. Where an attempt that was given up may still run, each names itself as `writer`,
    and the `guard` around all that is written raises once it has been replaced: the one that takes over calls
    `take_over`, after which a rename that the other had still to do finds nothing.
    """

    def __init__(
        self, folder: Path, writer: str = "", guard: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.folder = folder
        self._guard = guard
        self.last = folder / "last.safetensors"
        self.previous = folder / "previous.safetensors"
        self.best = folder / BEST
        self._incoming = folder / f"incoming{writer and '.'}{writer}.safetensors"
        self._last_is_whole = False

    def save(self, state: TrainingState, keep: int = 0, step: int = 0) -> None:
        """Write `last`; the one before becomes `previous`.

        With `keep`, the state is also kept as `step-<step>`, and only the newest `keep` of these stay. They share the
        disk space of `last` and `previous` where the file system has hard links.

        Raises CheckpointError (exit code 1) on a full disk, with the states that were there intact; what `guard`
        raises.
        """
        with self._guard():
            if not self._last_is_whole:
                self._last_is_whole = _is_whole(self.last)
            write_state(self._incoming, state)
        with self._guard():  # again, because writing takes long
            if self._last_is_whole:
                with suppress(FileNotFoundError):  # an attempt that was given up has renamed it
                    self.last.replace(self.previous)
            self._rename_incoming()
            if keep:
                self._keep(keep, step)
            sync(self.folder)
        self._last_is_whole = True

    def _keep(self, count: int, step: int) -> None:
        """Keep `last` under its step, and remove the oldest states beyond `count`."""
        own = self.folder / f"step-{step:08d}.safetensors"
        own.unlink(missing_ok=True)  # of an attempt that stopped before its next state
        try:
            own.hardlink_to(self.last)
        except OSError:  # a file system without links
            copied = own.with_name(f".{own.name}.tmp")
            shutil.copyfile(self.last, copied)
            copied.replace(own)
        for old in sorted(self.folder.glob("step-*.safetensors"))[:-count]:
            old.unlink(missing_ok=True)

    def save_best(self, state: TrainingState) -> None:
        """Write `best`. Raises as `save`."""
        with self._guard():
            write_state(self.best, state)

    def take_over(self) -> None:
        """Take the unfinished and unnamed files of other writers out of their way."""
        for path in self._unnamed():
            if not self.last.exists() and _is_whole(path):  # died between the two renames
                with suppress(FileNotFoundError):  # not dead, and did so itself
                    path.replace(self.last)
            else:
                path.unlink(missing_ok=True)
        for leftover in self.folder.glob(".*.tmp"):
            remove(leftover)

    def _unnamed(self) -> list[Path]:
        """Whole states, or torn ones, that no rename has given their name yet; the newest first."""
        changed: dict[Path, float] = {}
        for path in self.folder.glob("incoming*.safetensors"):
            with suppress(FileNotFoundError):  # its writer has renamed it since
                changed[path] = path.stat().st_mtime
        return sorted(changed, key=changed.__getitem__, reverse=True)

    def _rename_incoming(self) -> None:
        try:
            self._incoming.replace(self.last)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self._incoming} is gone: does another run write into {self.folder}?"
            ) from error

    def load(self) -> TrainingState | None:
        """`last`, else `previous` with a warning that names the damaged file; None where there is no state.

        Raises CheckpointError where there are states and all are damaged.
        """
        damaged: list[str] = []
        for path in self._candidates():
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

    def peek(self) -> JsonDict | None:
        """Return the JSON part of what `load` would read, judged by the files' headers; None without a state."""
        for path in self._candidates():
            with suppress(CheckpointError):
                return read_meta(path)
        return None

    def _candidates(self) -> Iterator[Path]:
        """Return the states to resume from, the best first.

        A process that died between the two renames leaves the newest whole state without a name.
        """
        return (path for path in (self.last, *self._unnamed(), self.previous) if path.exists())


def _is_whole(path: Path) -> bool:
    try:
        check_state(path)
    except CheckpointError:
        return False
    return True
