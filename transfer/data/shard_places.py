"""Where shards are: files, web servers that send ranges, and what fsspec reads."""

from __future__ import annotations

import functools
import http.client
import logging
import os
import socket
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from ...checkpoints.atomic import WriteFailedError, write_shared
from ...checkpoints.files import is_url, open_regular
from ...models.errors import DataError, GraftError
from .augment import reason_of
from .loading import SourceLostError

logger = logging.getLogger(__name__)
T = TypeVar("T")

TRIES, WAIT_S, TIMEOUT_S = 8, 0.5, 60.0
"""Attempts to reach a server, the wait before the second one, which then doubles, and the time of an answer."""
SILENT_S = 2.0
"""Longer waits are logged."""
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
"""What fsspec needs beside itself."""
LARGEST = 1 << 28
"""Bytes of a small file: an index of four million samples."""


class Files:
    """Shards of this machine."""

    def stamp(self, place: str) -> str:
        """Return the size of the shard, a dash, and what changes with its content."""
        return stamp_of_file(os.stat(place))  # noqa: PTH116 - as many as there are shards

    @contextmanager
    def stream(self, place: str) -> Iterator[IO[bytes]]:
        """Yield the shard from its beginning."""
        with open_regular(Path(place), refusal=DataError) as file:
            yield file

    def write(self, place: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""
        write_shared(Path(place), content, replace=True)

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size of each file of a folder by its name; none where there is no folder."""
        try:
            with os.scandir(folder) as entries:
                shown = [
                    entry for entry in entries if not entry.name.startswith(".")
                ]  # others are being written
                return {entry.name: entry.stat().st_size for entry in shown}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def read(self, place: str, start: int, size: int, stamp: str) -> bytes:
        """Return a range of bytes. Raises SourceLostError: the shard has changed."""
        with open_regular(Path(place), refusal=DataError) as file:
            check_same(place, stamp_of_file(os.fstat(file.fileno())), stamp)
            file.seek(start)
            return b"".join(iter(_left(file, size), b""))


def _left(file: IO[bytes], size: int) -> Callable[[], bytes]:
    end = file.tell() + size
    return lambda: file.read(end - file.tell())


def stamp_of_file(status: os.stat_result) -> str:
    if not stat.S_ISREG(status.st_mode):
        raise DataError("it is no regular file, and shards are read from files")
    return f"{status.st_size}-{status.st_mtime_ns}"


def check_same(place: str, found: str, stamp: str) -> None:
    if found != stamp:
        raise changed(place)


def changed(place: str) -> SourceLostError:
    return SourceLostError(
        f"{place} has changed since its index was made: make the index again by `graftvit data index`"
    )


class Web:
    """Shards of a web server (http, https), one request a range."""

    def stamp(self, place: str) -> str:
        """Return the size, a dash, and the version, as `read` sees them: a server may answer HEAD otherwise."""
        return self._range(place, 0, 1)[0]

    @contextmanager
    def stream(self, place: str) -> Iterator[IO[bytes]]:
        with _tried(lambda: urllib.request.urlopen(place, timeout=TIMEOUT_S)) as answer:
            yield answer

    def sizes(self, folder: str) -> dict[str, int]:
        raise DataError(
            f"{folder} cannot be listed: a web server shows single files; give a folder or a bucket"
        )

    def write(self, place: str, content: bytes) -> None:
        raise DataError(
            f"{place} cannot be written: a web server takes no files; give the folder or bucket that it serves"
        )

    def read(self, place: str, start: int, size: int, stamp: str) -> bytes:
        return self._range(place, start, size, stamp)[1]

    def _range(self, place: str, start: int, size: int, stamp: str | None = None) -> tuple[str, bytes]:
        request = urllib.request.Request(place)
        request.add_header("Range", f"bytes={start}-{start + max(size, 1) - 1}")

        def ask() -> tuple[str, bytes]:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                if answer.status != 206:
                    raise SourceLostError(f"the server of {place} sends no ranges: copy the shards to a disk")
                total = answer.headers.get("Content-Range", "").rpartition("/")[2]
                version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
                found = f"{total}-{version}"
                check_same(place, found, stamp or found)
                content: bytes = answer.read(size)
            if len(content) < size:
                raise ConnectionError(f"the server ended after {len(content)} of {size} bytes")
            return found, content

        return _tried(ask)


def _tried(ask: Callable[[], T]) -> T:
    """Return the answer of a server, which is asked again where it is busy, silent, or stops in the middle."""
    for attempt in range(TRIES - 1):
        try:
            return ask()
        except (OSError, http.client.HTTPException) as error:
            if _is_final(error):
                raise
            wait = WAIT_S * 2**attempt
            if wait > SILENT_S:
                logger.warning("a server of shards is asked again in %.0f s: %s", wait, error)
            time.sleep(wait)
    return ask()


def _is_final(error: Exception) -> bool:
    """Return whether asking again is of no use: there is no such file or host."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code != 429
    reason = getattr(error, "reason", None)
    return isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME


class Remote:
    """Shards of any other place that fsspec reads, such as a bucket. A forked process connects by itself."""

    def stamp(self, place: str) -> str:
        system = self._system(place)
        return f"{system.size(place)}-{system.ukey(place)}"

    @contextmanager
    def stream(self, place: str) -> Iterator[IO[bytes]]:
        with self._system(place).open(place, "rb") as file:
            yield file

    def write(self, place: str, content: bytes) -> None:
        system = self._system(place)
        try:
            system.pipe_file(place, content)
        except FileNotFoundError:  # a place that has folders, unlike a bucket
            system.makedirs(place.rpartition("/")[0], exist_ok=True)
            system.pipe_file(place, content)

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            found = self._system(folder).ls(folder, detail=True)
        except FileNotFoundError:
            return {}
        return {each["name"].rpartition("/")[2]: each["size"] for each in found}

    def read(self, place: str, start: int, size: int, stamp: str) -> bytes:
        return self._system(place).cat_file(place, start=start, end=start + size)

    def _system(self, place: str) -> Any:
        kind = place.partition(":")[0]
        try:
            return _connected(kind, os.getpid())
        except ImportError as error:
            needed = PACKAGES.get(kind, "fsspec")
            raise DataError(f"a place {kind}:// needs the package {needed}: pip install {needed}") from error


@functools.lru_cache(maxsize=8)
def _connected(kind: str, process: int) -> Any:
    import fsspec  # of huggingface_hub

    return fsspec.filesystem(kind, skip_instance_cache=True, use_listings_cache=False)


Store = Files | Web | Remote


def store_of(place: str) -> Store:
    """Return what reads a shard at that place."""
    if not is_url(place):
        return Files()
    return Web() if place.partition(":")[0].lower() in ("http", "https") else Remote()


@contextmanager
def reached(place: str) -> Iterator[None]:
    """Raise SourceLostError, with its place, for a shard that cannot be read."""
    try:
        yield
    except (SourceLostError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise SourceLostError(f"{place} does not exist") from error
    except DataError as error:
        raise SourceLostError(f"{place} cannot be read: {error}") from error
    except Exception as error:  # each kind of place fails in its own way
        raise SourceLostError(f"{place} cannot be read: {reason_of(error)}") from error


def stamp_of(place: str) -> str:
    """Return the stamp of a shard. Raises SourceLostError: it cannot be read."""
    with reached(place):
        return store_of(place).stamp(place)


def load(place: str | Path) -> bytes | None:
    """Return the content of a small file; None where it is missing or cannot be read."""
    try:
        with store_of(str(place)).stream(str(place)) as file:
            return file.read(LARGEST)
    except Exception:  # each kind of place says in its own way that it is missing
        return None


def write(place: str, content: bytes) -> None:
    """Write a small file, whole or not at all. Raises WriteFailedError; DataError: a web server takes no files."""
    try:
        store_of(place).write(place, content)
    except GraftError:
        raise
    except Exception as error:  # each kind of place fails in its own way
        raise WriteFailedError(f"{place} cannot be written: {reason_of(error)}") from error
