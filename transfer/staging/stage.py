"""`data.stage`: the data set on this node's own disk, copied where it is not there yet, whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...checkpoints.files import NOT_A_URL, is_url, nearest_folder, read_json
from ...models.errors import CheckpointError, ConfigError, DataError
from ..config import DataConfig
from ..data.datasets import check_dataset
from .copy_data_set import Progress, StagingStoppedError, copy, in_words
from .source import Source, check_has_files, find_source

logger = logging.getLogger(__name__)

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
