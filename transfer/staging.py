"""`data.stage`: the data set on this node's own disk, copied where it is not there yet, whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ..checkpoints.files import NOT_A_URL, is_url, nearest_folder, read_json
from ..models.errors import CheckpointError, ConfigError, DataError
from .config import DataConfig
from .data.archives import SPLITS, count_images, is_packed, on_disk, unpack
from .data.datasets import check_dataset
from .data.digits import split_folder
from .data.image_folder import find_images

# Find what to copy of a data set to a node's disk: its files, their sizes, and by what a copy of them is known.

THREADS = 16
"""That ask a file system at the same time: one that is far away answers late, but many at once."""
TOGETHER = 1024
"""Files that a pool of threads is given at a time."""
Key = tuple[int, int]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """A file to be copied to `place`, below the copy."""

    place: str
    path: str
    size: int
    modified: int
    """Nanoseconds."""
    key: Key


@dataclass(frozen=True)
class Source:
    """What is to be copied."""

    root: Path
    """The folder, or the one file, that the settings name."""
    pieces: list[Piece]
    links: dict[str, str] = field(default_factory=dict)
    """Place -> the file that it links to: what is no regular file stays where it is."""
    linked: frozenset[str] = frozenset()
    """Places that the source has by a link. Of files that are one, these become links in the copy as well."""
    folders: tuple[str, ...] = ()
    """Places of folders that must be there, empty or not."""
    setting: str = "data_path"
    """Setting that names `root`."""
    packed: bool = False
    """True if the one piece is an archive to be unpacked."""

    def needs(self) -> tuple[int, int]:
        """Return how many files the copy has, and the bytes that they take on a disk."""
        if self.packed:
            return count_images(self.root)
        return len(self.pieces), sum(on_disk(piece.size) for piece in self.pieces)

    def fingerprint(self) -> str:
        """Return a digest of where the files are, their names, sizes and times."""
        rows = sorted((piece.place, piece.size, piece.modified) for piece in self.pieces)
        whole = [str(self.root), self.packed, self.folders, sorted(self.links.items()), rows]
        return hashlib.sha256(json.dumps(whole).encode("utf-8", "surrogateescape")).hexdigest()[:12]

    def settings(self, copy: Path) -> dict[str, str | None]:
        """Return the settings of `data` that read the copy."""
        place = copy / self.root.name if self.root.is_file() and not self.packed else copy
        return {self.setting: f"hfds/{place}" if self.setting == "dataset" else str(place), "stage": None}


def find_source(config: DataConfig) -> Source:
    """Find what is to be copied.

    Raises ConfigError: there are no files that could be copied; DataError: they cannot be read.
    """
    check_has_files(config)
    family, _, name = config.dataset.partition("/")
    if family == "hfds" and Path(name).is_dir():
        return _tree(Path(name).absolute(), "dataset")
    root = Path(str(config.data_path)).expanduser().absolute()
    if not root.exists():
        hint = ": data.download=true fetches it there first, without data.stage" if config.download else ""
        raise DataError(f"data.data_path={config.data_path} does not exist{hint}")
    if root.is_file():
        return Source(root, list(_pieces([(root.name, str(root))], {})), packed=is_packed(config))
    return _images(root, config) if family in ("", "folder") else _tree(root, "data_path")


def check_has_files(config: DataConfig) -> None:
    """Raise ConfigError for a data set without files that could be copied."""
    family, _, name = config.dataset.partition("/")
    if family == "hfds" and Path(name).is_dir():
        return
    if family in ("digits", "hfids") or config.data_path is None:
        raise ConfigError(
            f"data.stage={config.stage}, but data.dataset={config.dataset} has no files that could be copied: "
            "leave data.stage out" + (", or give data.data_path" if family == "hfds" else "")
        )


def _images(root: Path, config: DataConfig) -> Source:
    """Return the images of the splits that the settings name, as `find_images` finds them: each real file once a
    split."""
    usual = tuple(name for name in SPLITS if (root / name).is_dir())
    named = [name for name in (config.train_split, config.val_split) if name]
    for name in named:
        if Path(name).is_absolute() or ".." in Path(name).parts:  # its copy would be elsewhere, too
            setting = "train_split" if name == config.train_split else "val_split"
            raise DataError(
                f"data.{setting}={name} lies outside of data.data_path, and data.stage copies only that"
            )
    roots = [split_folder(root, name) or (None if usual else root) for name in named]
    files: dict[str, str] = {}
    for each in dict.fromkeys(filter(None, roots)):
        found = find_images(each)
        files |= {path[len(os.path.join(root, "")) :]: path for path in sorted(found.files)}  # noqa: PTH118
    return _source(root, files.items(), "data_path", usual)


def _tree(root: Path, setting: str) -> Source:
    """Return all files of a folder; links are followed where they do not lead back."""
    return _source(root, _walk(root), setting, ())


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    for folder, inner, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder) + os.sep
        places = {name: os.path.join(folder, name) for name in inner}  # noqa: PTH118
        inner[:] = [name for name in inner if not real.startswith(os.path.realpath(places[name]) + os.sep)]
        for name in files:
            path = os.path.join(folder, name)  # noqa: PTH118
            yield os.path.relpath(path, root), path


def _source(root: Path, files: Iterable[tuple[str, str]], setting: str, folders: tuple[str, ...]) -> Source:
    links: dict[str, str] = {}
    pieces = list(_pieces(files, links))
    if not pieces:
        raise DataError(f"data.{setting}={root} holds no files that could be copied for data.stage")
    counts: dict[Key, int] = {}
    for piece in pieces:
        counts[piece.key] = counts.get(piece.key, 0) + 1
    linked = frozenset(
        piece.place
        for piece in pieces
        if counts[piece.key] > 1
        and os.path.realpath(piece.path) != os.path.realpath(root) + os.sep + piece.place
    )
    return Source(root, pieces, links, linked, folders, setting)


def _pieces(files: Iterable[tuple[str, str]], links: dict[str, str]) -> Iterator[Piece]:
    """Return the regular files; add what is not one, or is missing, to `links`."""
    with ThreadPoolExecutor(THREADS) as pool:
        for some in batched(files):
            found = pool.map(_status, (path for _, path in some))
            for (place, path), status in zip(some, found, strict=True):
                if status is None or not stat.S_ISREG(status.st_mode):
                    links[place] = path
                else:
                    key = (status.st_dev, status.st_ino)
                    yield Piece(place, path, status.st_size, status.st_mtime_ns, key)


def batched(items: Iterable[T]) -> Iterator[list[T]]:
    """Some at a time, for a pool of threads, which would take all at once."""
    rest = iter(items)
    while some := list(itertools.islice(rest, TOGETHER)):
        yield some


def _status(path: str) -> os.stat_result | None:
    try:
        return Path(path).stat()
    except OSError:
        return None


# Copying a data set to a folder: many files at once, with what is told on the way, and an end before the end.

logger = logging.getLogger(__name__)

CHUNK = 1 << 22
EVERY = 30.0
"""Seconds between two lines of progress."""


class StagingStoppedError(Exception):
    """The process was asked to stop while it copied or waited."""


def now() -> float:
    """Return seconds of a clock that never goes back."""
    return time.monotonic()


class Progress:
    """What is copied so far; a line now and then in the log, from whichever process copies."""

    def __init__(self, total: int, stopped: Callable[[], bool]) -> None:
        self.done, self.total, self._stopped = 0, max(1, total), stopped
        self._lock = threading.Lock()
        self._begin = self._told = now()

    def moved(self, count: int) -> None:
        """Count so many bytes more. Raises StagingStoppedError where the process is to stop."""
        with self._lock:
            self.done += count
            self._tell()
        if self._stopped():
            raise StagingStoppedError

    def _tell(self) -> None:
        time_now = now()
        if time_now - self._told < EVERY:
            return
        self._told = time_now
        share, speed = self.done / self.total, self.done / (time_now - self._begin)
        left = max(0, self.total - self.done) / max(1.0, speed)
        logger.warning(
            "data.stage on %s: %.0f %% of %s, %s/s, about %d s left",
            socket.gethostname(), 100 * min(1.0, share), in_words(self.total), in_words(int(speed)), left,
        )  # fmt: skip


def copy(source: Source, folder: Path, config: DataConfig, progress: Progress) -> None:
    """Fill `folder`. Raises DataError: a file cannot be read or written, or has changed; StagingStoppedError."""
    for place in source.folders:
        (folder / place).mkdir(parents=True, exist_ok=True)
    if source.packed:
        unpack(source.root, folder, config, progress.moved, room=progress.total)
        return
    first: dict[Key, Piece] = {}
    again = [piece for piece in source.pieces if first.setdefault(piece.key, piece) is not piece]
    with ThreadPoolExecutor(THREADS) as pool:
        for some in batched(first.values()):
            list(pool.map(lambda piece: _copy(piece, folder, progress), some))
    for piece in again:
        _repeat(folder, piece.place, first[piece.key].place, source.linked)
    for place, path in source.links.items():
        _made(folder / place).symlink_to(path)


def _copy(piece: Piece, folder: Path, progress: Progress) -> None:
    target = _made(folder / piece.place)
    try:
        with Path(piece.path).open("rb", buffering=0) as file, target.open("wb", buffering=0) as new:
            while chunk := file.read(CHUNK):
                new.write(chunk)
                progress.moved(len(chunk))
            size = new.tell()
    except PermissionError:  # one image that nobody may read is no reason to stop, staged or not
        with suppress(OSError):
            target.unlink()
        target.symlink_to(piece.path)
        return
    except OSError as error:
        where = error.filename or piece.path
        raise DataError(
            f"{where} cannot be copied to {folder} for data.stage: {error.strerror or error}"
        ) from error
    if size != piece.size:
        raise DataError(
            f"{piece.path} had {piece.size:,} bytes and {size:,} when it was copied for data.stage: start again when "
            "the data set is no longer written to"
        )


def _repeat(folder: Path, place: str, first: str, linked: frozenset[str]) -> None:
    """Repeat a file that is there under another name: by a link of the kind that it is in the source."""
    target = _made(folder / place)
    if place in linked or first in linked:
        target.symlink_to(os.path.relpath(folder / first, target.parent))
    else:
        target.hardlink_to(folder / first)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def in_words(count: float) -> str:
    """Return bytes, as in `12.3 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1024
    return f"{count:.4g} TiB"


LONGEST = 50
"""Characters of the source's name in that of its copy."""
POLL = 0.5
"""Seconds between two tries to be the one that copies."""


def stage(config: DataConfig, stopped: Callable[[], bool] = lambda: False) -> DataConfig:
    """Return the settings that read the copy in `config.stage`, which is made first where it is not there yet.

    Processes of a node that come at the same time share one: the first one copies. A copy is known by the names, sizes
    and times of its source's files. What was cut short is made again.

    Raises ConfigError: the folder does not exist here, or there are no files to copy. DataError: they cannot be read,
    or the disk cannot hold them. StagingStoppedError once `stopped` says so.
    """
    check_dataset(config)
    parent = _own_folder(stage_folder(config))
    source = find_source(config)
    target = parent / f"{source.root.name[:LONGEST]}-{source.fingerprint()}"
    with _alone(parent / f".{target.name}.lock", stopped):
        if _is_whole(target):
            logger.info("data.stage: %s is there already", target)
        else:
            _make(source, target, config, stopped)
    return config.model_copy(update=source.settings(target))


def check_stage(config: DataConfig, *, here: bool) -> None:
    """Check what `stage` refuses first, and copy nothing. `here`: the run would be on this machine.

    Raises ConfigError: there are no files to copy, or a variable is not set. DataError: the folder cannot be written.
    """
    check_has_files(config)
    if not here:
        return
    folder = stage_folder(config)
    if os.path.lexists(_path_of_own(folder)):
        _check_own(_path_of_own(folder))
    try:
        tempfile.TemporaryDirectory(dir=nearest_folder(folder)).cleanup()
    except OSError as error:
        raise DataError(f"data.stage={folder} cannot be written: {error.strerror}") from error


def stage_folder(config: DataConfig) -> Path:
    """`config.stage` with the variables of this node. Raises ConfigError: one is not set."""
    text = str(config.stage)
    for bare, braced in re.findall(r"\$(?:(\w+)|\{(\w+)\})", text):
        if not os.environ.get(bare or braced):
            raise ConfigError(
                f"data.stage={text}, but {bare or braced} is not set on {socket.gethostname()}: name a folder of the "
                "node's own disk, or data.stage=none to read the data set where it is"
            )
    path = os.path.expandvars(text)
    if is_url(path):
        raise ConfigError(f"data.stage={text} is {path!r} on {socket.gethostname()}: {NOT_A_URL}")
    return Path(path).expanduser().absolute()


def _own_folder(folder: Path) -> Path:
    """Return the folder of this user's copies, for this user alone."""
    own = _path_of_own(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            own.mkdir(mode=0o700)
        _check_own(own)
        own.chmod(0o700)
    except OSError as error:
        raise DataError(f"data.stage={folder} cannot be written: {error.strerror}") from error
    return own


def _path_of_own(folder: Path) -> Path:
    return folder / f"graftvit-data-{os.getuid()}"


def _check_own(own: Path) -> None:
    """Raise DataError where others could put something else there, as on a disk of all, or have put a link there."""
    status = own.lstat()
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not mine or status.st_mode & stat.S_IWOTH:
        raise DataError(
            f"data.stage: {own} is not a folder that only this user writes; remove it, or name another folder"
        )


def _make(source: Source, target: Path, config: DataConfig, stopped: Callable[[], bool]) -> None:
    temporary = target.with_name(f".{target.name}.partial")
    for old in (temporary, target):  # cut short, or damaged since
        shutil.rmtree(old, ignore_errors=True)
    files, size = source.needs()
    _check_room(source, files, size, target.parent)
    logger.warning(
        "data.stage on %s: copies %s (%s in %d files) to %s",
        socket.gethostname(), source.root, in_words(size), files, target,
    )  # fmt: skip
    try:
        temporary.mkdir()
        copy(source, temporary, config, Progress(size, stopped))
        _marker(target).write_text(json.dumps(_content(temporary)), encoding="utf-8")
        temporary.rename(target)
    except OSError as error:
        raise DataError(f"data.stage: {target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.warning("data.stage on %s: %s is ready", socket.gethostname(), target)


def _check_room(source: Source, files: int, size: int, folder: Path) -> None:
    """Raise DataError where the disk has too little room, before anything is copied."""
    disk = os.statvfs(folder)
    free, places = disk.f_bavail * disk.f_frsize, disk.f_favail
    short = f"{in_words(size)}, and {in_words(free)} are free" if size > free else ""
    if disk.f_files and files > places:
        short = f"{files:,} files, and there is room for {places:,}"
    if short:
        raise DataError(
            f"data.stage={folder.parent} cannot hold {source.root}: the copy needs {short} on {socket.gethostname()}; "
            "make room, name another folder, or leave data.stage out"
        )


def _is_whole(target: Path) -> bool:
    """Return whether the copy is there with all its files, of which a node's cleaning may have removed some."""
    try:
        written = read_json(_marker(target))
    except CheckpointError:
        return False
    return target.is_dir() and bool(written == _content(target))


def _marker(target: Path) -> Path:
    return target.with_name(f".{target.name}.json")


def _content(folder: Path) -> dict[str, int]:
    """Return how many files a copy has, and their bytes."""
    files = total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            files += 1
            total += os.lstat(os.path.join(path, name)).st_size  # noqa: PTH118 - millions of them
    return {"files": files, "bytes": total}


@contextmanager
def _alone(lock: Path, stopped: Callable[[], bool]) -> Iterator[None]:
    """Inside the block no other process of this node is. The system frees the lock of a process that dies."""
    import fcntl

    told = False
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    logger.warning("data.stage on %s: waits for a process that copies", socket.gethostname())
                told = True
            if stopped():
                raise StagingStoppedError
            time.sleep(POLL)
        yield
