"""The index of a shard: where each file of each sample begins, and how long it is.

A sample is the files of a tar that follow each other and have one name before its first point, as WebDataset has them;
an ending that comes again begins another sample.
One pass over a shard makes its index. It is looked for in the cache folder of this machine, under the shard's place and
its stamp (size and time, or what the server calls its version), and then beside the shard. Nothing else knows where an
index is.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import posixpath
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
from filelock import FileLock

from ...checkpoints.files import at_home, is_url
from ...models.errors import DataError, GraftError
from .sampler import Indices
from .shard_places import changed, check_same, load, reached, stamp_of, store_of, write

logger = logging.getLogger(__name__)

BLOCK = 512
"""Bytes of a tar's header."""
FORMAT = 3
"""Of the file of an index."""


class _Forward:
    """A stream as tarfile reads it: forward alone, with what was read last."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._place, self.last = stream, 0, b""

    def tell(self) -> int:
        return self._place

    def read(self, size: int) -> bytes:
        pieces: list[bytes] = []
        while size > 0 and (piece := self._stream.read(min(size, 1 << 20))):
            pieces.append(piece)
            size -= len(piece)
        self.last = b"".join(pieces)
        self._place += len(self.last)
        return self.last

    def seek(self, place: int) -> None:
        if place != self._place and self._stream.seekable():
            self._place = self._stream.seek(place)
        while self._place < place and self.read(min(place - self._place, 1 << 20)):
            pass


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a shard, n of m files: of sample i the files `firsts[i]` to `firsts[i + 1]`.

    A file has the ending `endings[kinds[j]]`, and its content `sizes[j]` bytes from `offsets[j]` on. `stamp` is that of
    the shard.
    """

    stamp: str
    keys: bytes
    """The names of the samples, one a line."""
    endings: tuple[str, ...]
    firsts: Indices
    kinds: Indices
    offsets: Indices
    sizes: Indices

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def key(self, sample: int) -> str:
        return self.keys.split(b"\n")[sample].decode("utf-8", "surrogateescape")

    def files(self, sample: int) -> dict[str, tuple[int, int]]:
        """Return where each file of a sample begins, and its size, by ending."""
        members = range(int(self.firsts[sample]), int(self.firsts[sample + 1]))
        return {self.endings[self.kinds[j]]: (int(self.offsets[j]), int(self.sizes[j])) for j in members}

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        np.savez(
            file,
            format=np.array(FORMAT),
            stamp=np.array(self.stamp),
            keys=np.frombuffer(self.keys, np.uint8),
            endings=np.array(self.endings or ("",)),
            firsts=self.firsts,
            kinds=self.kinds,
            offsets=self.offsets,
            sizes=self.sizes,
        )
        return file.getvalue()

    @classmethod
    def of(cls, content: bytes) -> ShardIndex | None:
        """Return the index that `to_bytes` wrote; None where it is damaged."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as held:
                numbers = [held[name].astype(np.int64) for name in ("firsts", "kinds", "offsets", "sizes")]
                endings = tuple(map(str, held["endings"]))
                index = cls(str(held["stamp"]), held["keys"].tobytes(), endings, *numbers)
                return index if int(held["format"]) == FORMAT and index._is_whole() else None
        except Exception:  # of zip files and arrays, in many ways
            return None

    def _is_whole(self) -> bool:
        m = len(self.sizes)
        whole = self.firsts[0] == 0 and self.firsts[-1] == m and bool((np.diff(self.firsts) > 0).all())
        whole &= len(self.kinds) == len(self.offsets) == m and self.keys.count(b"\n") + 1 == max(1, len(self))
        whole &= bool(((self.kinds >= 0) & (self.kinds < len(self.endings))).all())
        return whole and bool(((self.offsets >= BLOCK) & (self.sizes >= 0)).all())


def read_members(stream: IO[bytes], stamp: str) -> ShardIndex:
    """Return the index of a shard, by one pass over it. Raises DataError: it is cut off, damaged, or no tar file."""
    keys: list[str] = []
    endings: dict[str, int] = {}
    own: set[str] = set()  # the endings of the last sample
    firsts: list[int] = []
    rows: list[tuple[int, int, int]] = []
    forward, name = _Forward(stream), ""
    try:
        with tarfile.open(fileobj=forward, mode="r:") as archive:  # type: ignore[call-overload]
            while (info := archive.next()) is not None:
                archive.members.clear()  # which it keeps for names, and nobody asks
                name = info.name
                if info.size < 0:  # the next header would be an earlier one, for ever
                    raise DataError(f"{name!r} has a size below 0")
                key, ending = _parts(name)
                if not info.isreg() or info.issparse() or not ending:
                    continue
                if not keys or keys[-1] != key or ending in own:
                    keys.append(key)
                    firsts.append(len(rows))
                    own.clear()
                own.add(ending)
                rows.append((endings.setdefault(ending, len(endings)), info.offset_data, info.size))
    except tarfile.TarError as error:
        raise DataError(f"it is cut off or damaged after {name!r}: {error}") from error
    # tarfile takes the end of the stream, or any block that is no header, for the end of the files
    if not forward.last:
        raise DataError(f"it is cut off after {name!r}: the mark of its end is missing")
    if any(forward.last):
        raise DataError(f"it is damaged after {name!r}: there is no header of a file")
    if any(forward.read(tarfile.RECORDSIZE)):
        raise DataError(
            f"it has more after its end, {name!r}, as tar files do that were joined by cat: write them again"
        )
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    text = "\n".join(key.replace("\n", " ") for key in keys).encode("utf-8", "surrogateescape")
    return ShardIndex(stamp, text, tuple(endings), np.array([*firsts, len(rows)], dtype=np.int64), *columns)


def _parts(name: str) -> tuple[str, str]:
    """Return the name of a file's sample and its ending, all after the first point, in lower case."""
    folder, base = posixpath.split(name)
    key, _, ending = base.partition(".")
    return (posixpath.join(folder, key), ending.lower()) if key else (name, "")


def check_header(place: str, block: bytes, size: int) -> None:
    """Raise SourceLostError unless the block before a file's content says its size, as the index does."""
    try:
        same = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape").size == size
    except tarfile.HeaderError:
        same = False
    if not same:
        raise changed(place)


# Where the index of a shard is.


def cached(*parts: str) -> Path:
    """Return a file of the cache folder."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
    return cache_folder() / digest[:2] / f"{digest[2:32]}.npz"


def cache_folder() -> Path:
    return at_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "graftvit" / "shards"


def beside(place: str) -> str:
    """Return where the index lies that is kept beside a shard: `NAME.tar.npz`."""
    path, mark, query = place.partition("?") if is_url(place) else (place, "", "")
    return f"{path}.npz{mark}{query}"


def keep(path: Path, content: bytes) -> None:
    """Write a file of the cache folder, where that is possible."""
    try:
        write(str(path), content)
    except GraftError as error:  # a full or a read-only disk: the index is made again
        logger.warning("the index of shards is not kept: %s", error)


def _held(place: str, stamp: str, *, exact: bool) -> ShardIndex | None:
    """Return the index of the shard with that stamp.

    Beside a copy of a shard lies an index with the stamp of the first one: unless `exact`, only the size has to be the
    same, and `check_header` looks at each file that is read. A stamp without a version proves nothing.
    """
    if exact and stamp.endswith("-"):
        return None
    for where in (str(cached(place, stamp)), beside(place)):
        index = _load_index(where)
        if index is None or (index.stamp != stamp and (exact or _size(index.stamp) != _size(stamp))):
            continue
        if is_url(where):
            keep(cached(place, stamp), index.to_bytes())
        return replace(index, stamp=stamp)
    return None


def _load_index(place: str) -> ShardIndex | None:
    return None if (content := load(place)) is None else ShardIndex.of(content)


def _size(stamp: str) -> str:
    return stamp.partition("-")[0]


def find_index(place: str, stamp: str | None = None, *, exact: bool = False) -> ShardIndex:
    """Return the index of a shard: from the cache, from beside the shard, or made now and kept in the cache.

    Of the processes of a machine, one makes it. Raises SourceLostError: the shard cannot be read, or is not the one of
    `stamp`.
    """
    store = store_of(place)
    with reached(place):
        found = store.stamp(place)
        check_same(place, found, stamp or found)
        index = _held(place, found, exact=exact)
        if index is not None:
            return index
        with _alone(cached(place, found)):
            index = _held(place, found, exact=exact)  # made while this process waited
            if index is None:
                with store.stream(place) as stream:
                    index = read_members(stream, found)
                check_same(place, store.stamp(place), found)
                keep(cached(place, found), index.to_bytes())
    return index


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process in at a time, or all where the cache cannot be written or its file system has no locks."""
    lock = path.with_suffix(".lock")
    with ExitStack() as held:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(lock))
            held.callback(lambda: lock.unlink(missing_ok=True))
        except (OSError, NotImplementedError):
            pass
        yield


def index_shard(place: str, *, aside: bool) -> tuple[ShardIndex, bool]:
    """Return the index of a shard as it is now, and whether it was written now: `aside` the shard, or in the cache.

    Raises SourceLostError: the shard cannot be read; as `write`: nothing can be written beside it.
    """
    stamp = stamp_of(place)
    held = _load_index(beside(place)) if aside else _held(place, stamp, exact=True)
    if held is not None and held.stamp == stamp:
        return held, False
    index = find_index(place, stamp, exact=True)
    if aside:
        write(beside(place), index.to_bytes())
    return index, True
