"""Keep the states of a run: the last, the one before it, and the best."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..models.errors import CheckpointError, JsonDict, check_types
from .atomic import remove, sync, write_file
from .weight_files import (
    BLANK,
    DIGEST_KEY,
    STATE_KEY,
    Weights,
    check_digest,
    compute_digest,
    is_sharded,
    outline,
    read_tree,
)

LAST, PREVIOUS, BEST = "last", "previous", "best"
"""The names of states: the newest, the one before it, and the one that a run's metric picks."""
STATES = (LAST, PREVIOUS, BEST)


def find_state(folder: Path, name: str = LAST) -> Path:
    """Return where a state is, or would be: the folder of a sharded run, else a file."""
    sharded = folder / name
    return sharded if sharded.is_dir() else folder / f"{name}.safetensors"


@dataclass
class TrainingState:
    """What a run needs to resume: tensors by flat name, and JSON (tuples come back as lists)."""

    tensors: dict[str, Tensor]
    meta: JsonDict
    folder: Path | None = None
    """Where the tensors are, of a sharded run: those here are outlines."""

    def outline(self) -> TrainingState:
        """Return the same with tensors that have a shape and no memory."""
        return replace(self, tensors={name: tensor.to("meta") for name, tensor in self.tensors.items()})


@check_types()
def write_state(path: Path, state: TrainingState) -> None:
    """Write `state` to `path`, whole or not at all, and return when it is on the disk.

    Raises WriteFailedError (a CheckpointError with exit code 1): the disk is full or refuses the file.
    What was at `path` is then as it was.
    """
    meta = json.dumps(state.meta)
    tensors = _separate(state.tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + len(meta)

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata={STATE_KEY: meta, DIGEST_KEY: BLANK.decode()})
        with temporary.open("r+b") as file:
            position, digest = compute_digest(temporary, file)
            file.seek(position)
            file.write(digest)

    write_file(path, write, size=size)


@check_types()
def read_state(path: Path) -> TrainingState:
    """Return the state in `path`, after a check of its digest; of a sharded run, its outline.

    Raises CheckpointError naming the file: missing, no training state, truncated, or changed since.
    """
    meta = check_state(path)
    if is_sharded(path):
        return TrainingState(outline(path).tree, meta, path)
    return TrainingState(read_tree(path, "safetensors"), meta)


def read_meta(path: Path) -> JsonDict:
    """Return the JSON part of the state in `path`, from its header alone; do not check the tensors.

    Raises CheckpointError naming the file: missing, no training state, or cut short.
    """
    return _meta(outline(path))


def check_state(path: Path) -> JsonDict:
    """Return the JSON part of a state. Raise CheckpointError as `read_state`, without its tensors in memory."""
    meta = _meta(outline(path))  # first: a file longer than its tensors is not read to its end
    check_digest(path)
    return meta


def _meta(found: Weights) -> JsonDict:
    try:
        meta = json.loads(found.metadata[STATE_KEY])
    except KeyError as error:
        raise CheckpointError(
            f"{found.origin} is damaged or no training state: it has no {STATE_KEY}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{found.origin} is damaged: {error}") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{found.origin} is damaged: its {STATE_KEY} is no table")
    return meta


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors, no two of them on one storage, which safetensors would refuse."""
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        storage = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    return separate


logger = logging.getLogger(__name__)


class StateFolder:
    """`last`, `previous` and `best` in one folder; at any moment at least one whole state is there.

    Each is one file, or of a sharded run a folder with a file of each process.

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
        self.incoming = folder / f"incoming{writer and '.'}{writer}"
        """The folder that the processes of a sharded run write into."""
        self._last_is_whole = False

    @property
    def last(self) -> Path:
        """The newest state."""
        return find_state(self.folder)

    @property
    def previous(self) -> Path:
        """The state before it."""
        return find_state(self.folder, PREVIOUS)

    @property
    def best(self) -> Path:
        """The state that the metric picked."""
        return find_state(self.folder, BEST)

    def save(self, state: TrainingState, keep: int = 0, step: int = 0) -> None:
        """Write `last`; the one before becomes `previous`.

        With `keep`, the state is also kept as `step-<step>`, and only the newest `keep` of these stay. They share the
        disk space of `last` and `previous` where the file system has hard links.

        Raises CheckpointError (exit code 1) on a full disk, with the states that were there intact; what `guard`
        raises.
        """
        incoming = self.incoming.with_name(f"{self.incoming.name}.safetensors")
        with self._guard():
            self._check_last()
            write_state(incoming, state)
        with self._guard():  # again, because writing takes long
            self._become_last(incoming, keep, step)

    def save_best(self, state: TrainingState) -> None:
        """Write `best`. Raises as `save`."""
        with self._guard():
            best = self.folder / f"{BEST}.safetensors"
            if find_state(self.folder, BEST) == best:
                write_state(best, state)
                return
            incoming = self.folder / f".{best.name}.tmp"
            write_state(incoming, state)
            self._name(incoming, BEST)

    def commit(self, *, last: bool, best: bool, keep: int = 0, step: int = 0) -> None:
        """Give what all processes have written into `incoming` its names. Raises as `save`."""
        with self._guard():
            self._check_last()
            if best:
                self._name(_link(self.incoming, self.folder / BEST), BEST)
            if last:
                self._become_last(self.incoming, keep, step)
            else:
                remove(self.incoming)

    def _check_last(self) -> None:
        self._last_is_whole = self._last_is_whole or _is_whole(self.last)

    def _become_last(self, incoming: Path, keep: int, step: int) -> None:
        if self._last_is_whole:
            with suppress(FileNotFoundError):  # an attempt that was given up has renamed it
                self._name(self.last, PREVIOUS)
        try:
            self._name(incoming, LAST)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{incoming} is gone: does another run write into {self.folder}?"
            ) from error
        if keep:
            self._keep(keep, step)
        sync(self.folder)
        self._last_is_whole = True

    def _name(self, state: Path, name: str) -> None:
        """Rename a state. A folder cannot be replaced in one step: one of this name is set aside first."""
        target = self.folder / (name if state.is_dir() else f"{name}.safetensors")
        before = find_state(self.folder, name)
        if before == target and not state.is_dir():
            state.replace(target)  # which a folder that is no state refuses
            return
        aside = self.folder / f"{before.name}.old"
        with suppress(FileNotFoundError):
            remove(aside)
            before.replace(aside)
        state.replace(target)
        remove(aside)

    def _keep(self, count: int, step: int) -> None:
        """Keep `last` under its step, and remove the oldest states beyond `count`."""
        last, name = self.last, f"step-{step:08d}"
        remove(find_state(self.folder, name))  # of an attempt that stopped before its next state
        _link(last, self.folder / name).replace(self.folder / f"{name}{last.suffix}")
        for old in sorted(self.folder.glob("step-*"))[:-count]:
            remove(old)

    def take_over(self) -> None:
        """Take the unfinished and unnamed files of other writers out of their way."""
        for path in self._unnamed():
            if not self.last.exists() and _is_whole(path):  # died between the two renames
                with suppress(FileNotFoundError):  # not dead, and did so itself
                    self._name(path, LAST)
            else:
                remove(path)
        for aside in self.folder.glob("*.old"):
            name = aside.name.partition(".")[0]
            if name not in STATES:
                continue
            if find_state(self.folder, name).exists():
                remove(aside)
            else:  # died before what was to replace it had its name
                aside.replace(aside.with_suffix(""))
        for leftover in self.folder.glob(".*.tmp"):
            remove(leftover)

    def _unnamed(self) -> list[Path]:
        """Whole states, or torn ones, that no rename has given their name yet; the newest first."""
        changed: dict[Path, float] = {}
        for path in self.folder.glob("incoming*"):
            with suppress(FileNotFoundError):  # its writer has renamed it since
                changed[path] = path.stat().st_mtime
        return sorted(changed, key=changed.__getitem__, reverse=True)

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


def _link(source: Path, target: Path) -> Path:
    """Copy a state beside `target` under a temporary name, without disk space where the file system has hard links."""
    copied = target.with_name(f".{target.name}.tmp")
    remove(copied)
    try:
        _copy(source, copied, os.link)
    except OSError:  # a file system without links
        remove(copied)
        _copy(source, copied, shutil.copyfile)
    return copied


def _copy(source: Path, target: Path, copy: Callable[[Path, Path], object]) -> None:
    if source.is_dir():
        shutil.copytree(source, target, copy_function=lambda *names: copy(*map(Path, names)))
    else:
        copy(source, target)


def _is_whole(path: Path) -> bool:
    try:
        check_state(path)
    except CheckpointError:
        return False
    return True
