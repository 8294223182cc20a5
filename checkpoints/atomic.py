"""Write files and folders whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..models.errors import CheckpointError, RunFailedError
from .files import NOT_A_URL, is_url, kind_of, set_aside

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DAY = 86_400


class WriteFailedError(CheckpointError, RunFailedError):
    """A checkpoint that could not be written, because the disk is full or refused it; exit code 1."""


def write_file(path: Path, write: Callable[[Path], object], *, size: int) -> None:
    """Call `write(temporary)` and move the result to `path` in one step; the old file stays until then.

    The temporary file lies in a folder of its own, for safetensors from 0.8 puts another one beside it. What
    an earlier attempt that died left there is removed first: a path has one writer at a time.
    `size` is the number of bytes needed, named in the error.

    Raises WriteFailedError: the disk is full, or the file system refuses the file.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with _explained(path, size), _removed(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        temporary.mkdir()
        write(temporary / path.name)
        follow_umask(temporary)
        sync(temporary / path.name)
        (temporary / path.name).replace(path)
        sync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file of these bytes, whole or not at all. Raises WriteFailedError as `write_file`."""
    write_file(path, lambda temporary: temporary.write_bytes(data), size=len(data))


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all. Raises WriteFailedError as `write_file`."""
    write_bytes(path, text.encode("utf-8"))


def write_shared(path: Path, data: bytes, *, replace: bool) -> None:
    """Write a file that other processes may write at the same time, whole or not at all.

    Without `replace`, a file that is there stays: of several writers the first one wins.
    Raises WriteFailedError as `write_file`.
    """
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.own")
    with _explained(path, len(data)), _removed(own):
        write_bytes(own, data)
        if replace:
            own.replace(path)
            return
        try:
            os.link(own, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            if not path.exists():
                own.replace(path)


def write_folder(
    path: Path, write: Callable[[Path], None], *, size: int, check: Callable[[], object] | None = None
) -> None:
    """Call `write(temporary)` to fill a new folder, and put it at `path`.

    A folder cannot be renamed over another one: the old one is set aside for the moment between two renames,
    and is brought back by `recover_folder` if the process died there.
    `check` is of a folder that several processes may write at once: called right before the renames, it raises where
    another one was first. Others may be writing theirs, so what is unfinished is removed a day after it was touched.

    Raises WriteFailedError as `write_file`; what `check` raises.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    aside = set_aside(path)
    with _explained(path, size), _removed(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(path)
        remove_leftovers(path, older=0 if check is None else DAY)
        temporary.mkdir()
        write(temporary)
        follow_umask(temporary)
        for file in sorted(temporary.rglob("*")):
            sync(file)
        sync(temporary)
        there = os.path.lexists(path)  # before the check: what is put there after it is not set aside
        if check is not None:
            check()
        if there:
            path.rename(aside)
        temporary.rename(path)
        sync(path.parent)
        remove(aside)


def recover_folder(path: Path) -> None:
    """Bring back what a dead `write_folder` had set aside, or remove it if the new folder is there."""
    aside = set_aside(path)
    if not os.path.lexists(aside):
        return
    if path.exists():
        remove(aside)
    else:
        aside.rename(path)


def remove_leftovers(path: Path, *, older: float = 0) -> None:
    """Remove the temporary files of `path` that dead attempts left, if they were not touched for `older` seconds."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 12}.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process removes them, too
            if time.time() - leftover.lstat().st_mtime >= older:
                remove(leftover)


def follow_umask(folder: Path) -> None:
    """Give the content of `folder`, which `mkdir` made, the permissions that the user's umask allows.

    safetensors and temporary folders keep what they write to its user. The folder shows the umask: asking the
    system for it would set it, for all threads.
    """
    allowed = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if not path.is_symlink():
            with contextlib.suppress(OSError):  # a file system that has no permissions
                path.chmod(allowed if path.is_dir() else allowed & 0o666)


def sync(path: Path) -> None:
    """Wait until the file or the directory's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content, if it exists; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # its writer may be removing it, too
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _removed(temporary: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            remove(temporary)


@contextmanager
def _explained(path: Path, size: int) -> Iterator[None]:
    """Turn what the operating system and safetensors say of a failed write into one sentence.

    Refuse a URL, and to put a file in the place of a pipe or a device, as /dev/stdout is one.
    """
    if is_url(path):
        raise WriteFailedError(f"{path} cannot be written: {NOT_A_URL}")
    kind = kind_of(path)
    if kind is not None:
        raise WriteFailedError(f"{path} cannot be written: it is {kind}; give the name of a file")
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number not in FULL:
            reason = getattr(error, "strerror", None) or error
            raise WriteFailedError(f"{path} cannot be written: {reason}") from error
        raise WriteFailedError(
            f"{path} cannot be written: it needs {size:,} bytes and {_room(path, number)}; "
            "what was saved before is intact, make room and start again"
        ) from error


def _error_number(error: Exception) -> int | None:
    """Return the system's number of an error; safetensors has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)|code: (\d+)", str(error))
    return int(found[1] or found[2]) if found else None


def _room(path: Path, number: int | None) -> str:
    if number == errno.EFBIG:
        return "the file system or a limit allows no file of that size"
    try:
        return f"the disk has {shutil.disk_usage(path.parent).free:,} free"
    except OSError:
        return "the disk is full"
