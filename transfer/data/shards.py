"""Shards (`wds/...`): tar files whose samples are read by index, on this machine or by ranges over the network.

A sample is the files of a tar that follow each other and have one name before its first point, as WebDataset has them.
One pass over a shard makes its index: where each file of each sample begins, and how long it is. Indexes are kept in a
cache folder, under the shard's place and its stamp (size and time, or what the server calls its version): those of a
changed shard are made again.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import io
import json
import logging
import os
import posixpath
import re
import stat
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import yaml
from PIL import Image

from ...checkpoints.atomic import write_shared
from ...checkpoints.files import at_home, is_url, open_regular
from ...models.errors import DataError, JsonDict
from ..config import DataConfig
from .augment import reason_of
from .image_folder import Header
from .loading import SourceLostError, followed
from .sampler import WINDOW, Indices, WindowOrder

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Where shards are: files, web servers that send ranges, and what fsspec reads.

TRIES, WAIT_S, TIMEOUT_S = 4, 0.5, 60.0
"""Attempts to reach a server, the wait before the second one, which then doubles, and the time of an answer."""
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
"""What fsspec needs beside itself."""


class Files:
    """Shards of this machine."""

    def stamp(self, place: str) -> str:
        """Return what changes with the shard."""
        return _stamp(os.stat(place))  # noqa: PTH116 - as many as there are shards

    @contextmanager
    def stream(self, place: str) -> Iterator[IO[bytes]]:
        """Yield the shard from its beginning."""
        with open_regular(Path(place), refusal=DataError) as file:
            yield file

    def read(self, place: str, start: int, size: int, stamp: str) -> bytes:
        """Return a range of bytes. Raises SourceLostError: the shard has changed."""
        with open_regular(Path(place), refusal=DataError) as file:
            _check_same(place, _stamp(os.fstat(file.fileno())), stamp)
            file.seek(start)
            return b"".join(iter(_left(file, size), b""))


def _left(file: IO[bytes], size: int) -> Callable[[], bytes]:
    end = file.tell() + size
    return lambda: file.read(end - file.tell())


def _stamp(status: os.stat_result) -> str:
    if not stat.S_ISREG(status.st_mode):
        raise DataError("it is no regular file, and shards are read from files")
    return f"{status.st_size}-{status.st_mtime_ns}"


def _check_same(place: str, found: str, stamp: str) -> None:
    if found != stamp:
        raise SourceLostError(
            f"{place} has changed since its index was made: start again with the shard as it is"
        )


class Web:
    """Shards of a web server (http, https), one request a range."""

    def stamp(self, place: str) -> str:
        request = urllib.request.Request(place, method="HEAD")

        def ask() -> str:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return self._version(answer, answer.headers.get("Content-Length"))

        return _tried(ask)

    @contextmanager
    def stream(self, place: str) -> Iterator[IO[bytes]]:
        with _tried(lambda: urllib.request.urlopen(place, timeout=TIMEOUT_S)) as answer:
            yield answer

    def read(self, place: str, start: int, size: int, stamp: str) -> bytes:
        request = urllib.request.Request(place)
        request.add_header("Range", f"bytes={start}-{start + max(size, 1) - 1}")

        def ask() -> bytes:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                if answer.status != 206:
                    raise SourceLostError(f"the server of {place} sends no ranges: copy the shards to a disk")
                total = answer.headers.get("Content-Range", "").rpartition("/")[2]
                _check_same(place, self._version(answer, total), stamp)
                content: bytes = answer.read(size)
            if len(content) < size:
                raise ConnectionError(f"the server ended after {len(content)} of {size} bytes")
            return content

        return _tried(ask)

    def _version(self, answer: Any, size: str | None) -> str:
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        return f"{size}-{version}"


def _tried(ask: Callable[[], T]) -> T:
    """Return the answer of a server, which is asked again where it is busy, silent, or stops in the middle."""
    for attempt in range(TRIES - 1):
        try:
            return ask()
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429:
                raise
            time.sleep(WAIT_S * 2**attempt)
    return ask()


class Remote:
    """Shards of any other place that fsspec reads, such as a bucket. A forked process connects by itself."""

    def stamp(self, place: str) -> str:
        found: str = self._system(place).ukey(place)
        return found

    @contextmanager
    def stream(self, place: str) -> Iterator[IO[bytes]]:
        with self._system(place).open(place, "rb") as file:
            yield file

    def read(self, place: str, start: int, size: int, stamp: str) -> bytes:
        content: bytes = self._system(place).cat_file(place, start=start, end=start + size)
        return content

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
def _reached(place: str) -> Iterator[None]:
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


# The index of a shard.

BLOCK = 512
"""Bytes of a tar's header."""
FORMAT = 1
"""Of the files in the cache."""


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

    A file has the ending `endings[kinds[j]]`, and its content `sizes[j]` bytes from `offsets[j]` on.
    """

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
                index = cls(held["keys"].tobytes(), tuple(map(str, held["endings"])), *numbers)
                whole = int(held["format"]) == FORMAT
        except MemoryError:
            raise
        except Exception:  # of zip files and arrays, in many ways
            return None
        m, steps = len(index.sizes), np.diff(index.firsts)
        whole &= index.firsts[0] == 0 and index.firsts[-1] == m and bool((steps > 0).all())
        whole &= bool((index.kinds < len(index.endings)).all()) and len(index.offsets) == m
        return index if whole else None


def read_members(stream: IO[bytes]) -> ShardIndex:
    """Return the index of a shard, by one pass over it. Raises DataError: it is cut off, damaged, or no tar file."""
    keys: list[str] = []
    endings: dict[str, int] = {}
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
                if not keys or keys[-1] != key:
                    keys.append(key)
                    firsts.append(len(rows))
                rows.append((endings.setdefault(ending, len(endings)), info.offset_data, info.size))
    except tarfile.TarError as error:
        raise DataError(f"it is cut off or damaged after {name!r}: {error}") from error
    if any(forward.last):  # tarfile takes any block that is no header for the end
        raise DataError(f"it is damaged after {name!r}: there is no header of a file")
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    text = "\n".join(key.replace("\n", " ") for key in keys).encode("utf-8", "surrogateescape")
    return ShardIndex(text, tuple(endings), np.array([*firsts, len(rows)], dtype=np.int64), *columns)


def _parts(name: str) -> tuple[str, str]:
    """Return the name of a file's sample and its ending, all after the first point, in lower case."""
    folder, base = posixpath.split(name)
    key, _, ending = base.partition(".")
    return (posixpath.join(folder, key), ending.lower()) if key else (name, "")


def _cached(*parts: str) -> Path:
    """Return a file of the cache folder."""
    root = at_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
    return root / "graftvit" / "shards" / digest[:2] / f"{digest[2:32]}.npz"


def find_index(place: str, stamp: str | None = None) -> tuple[ShardIndex, str]:
    """Return the index of a shard and its stamp: from the cache, or made now and kept there.

    Raises SourceLostError: the shard cannot be read, or is not the one of `stamp`.
    """
    store = store_of(place)
    with _reached(place):
        found = store.stamp(place)
        _check_same(place, found, stamp or found)
        path = _cached(place, found)
        index = ShardIndex.of(_held(path)) if path.is_file() else None
        if index is None:
            with store.stream(place) as stream:
                index = read_members(stream)
            _check_same(place, store.stamp(place), found)
            _keep(path, index.to_bytes())
    return index, found


def _held(path: Path) -> bytes:
    with open_regular(path, refusal=DataError) as file:
        return file.read()


def _keep(path: Path, content: bytes) -> None:
    try:
        write_shared(path, content, replace=True)
    except Exception as error:  # a full or a read-only disk: the index is made again
        logger.warning("the index of shards is not kept: %s", error)


# The shards of a split.

BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
NAMES = "shards-{0000..0009}.tar"


class Split(NamedTuple):
    """Places of shards; how many images there are, where it is said; the field of the labels."""

    places: list[str]
    samples: int | None
    field: str | None


def find_split(config: DataConfig, split: str) -> Split:
    """Return the shards that a split names: itself, as in `shards-{0000..0009}.tar`, or in `_info.json`.

    Raises DataError: it names none.
    """
    root = str(config.data_path)
    pattern, _, count = split.partition("|")
    if ".tar" in pattern or ".." in pattern:
        names = [name for part in pattern.split("::") for name in expand(part)]
        samples, field = int(count) if count.isdigit() else None, None
    else:
        described = _described(root, split)
        names, samples = described["filenames"], described.get("num_samples")
        field = described.get("alt_label") or None
    return Split([_joined(root, name) for name in names], samples, config.label_column or field)


def expand(pattern: str) -> list[str]:
    """Return all names of a pattern: `a-{0..1}` gives a-0 and a-1, `{train,test}-0` gives train-0 and test-0."""
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    words = found[1].split(",")
    if numbers := NUMBERS.fullmatch(found[1]):
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") else 0
        words = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    before, after = pattern[: found.start()], expand(pattern[found.end() :])
    return [before + word + rest for word in words for rest in after]


def _joined(root: str, name: str) -> str:
    if is_url(name) or name.startswith("/"):
        return name
    return f"{root.rstrip('/')}/{name}" if is_url(root) else str(Path(root).absolute() / name)


def _described(root: str, split: str) -> JsonDict:
    """Return what `_info.json` or `_info.yaml` says about a split."""
    reasons = []
    for name, parse in (("_info.json", json.load), ("_info.yaml", yaml.safe_load)):
        place = _joined(root, name)
        try:
            with _reached(place), store_of(place).stream(place) as file:
                if not is_url(place):
                    _stamp(os.fstat(file.fileno()))
                splits = parse(file)["splits"]
                names = splits[split]["filenames"] if split in splits else None
        except SourceLostError as error:
            reasons.append(str(error))
            continue
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names) or not names:
            raise DataError(
                f"{place} names no shards of split {split!r}, only of {', '.join(sorted(splits))}"
            )
        found: JsonDict = splits[split]
        return found
    raise DataError(
        f"data.dataset=wds has no shards of split {split!r}: {reasons[0]}; write an _info.json beside the shards, or "
        f"name them, as in data.train_split='{NAMES}'"
    )


def count_samples(places: Sequence[str], told: str = "index of shards") -> tuple[Indices, list[str]]:
    """Return the number of samples of each shard, and its stamp; indexes that are missing are made.

    What was counted is kept. Shards of this machine are looked at again; those of the network when they are read.
    """
    local = [not is_url(place) for place in places]
    stamps = ["" for _ in places]
    for number, place in enumerate(places):
        if local[number]:
            with _reached(place):
                stamps[number] = store_of(place).stamp(place)
    path = _cached("counts", *places, *stamps)
    if (kept := _read_counts(path, len(places))) is not None:
        return kept
    counts = np.zeros(len(places), dtype=np.int64)
    for number, place in enumerate(followed(places, len(places), told)):
        index, stamps[number] = find_index(place)
        counts[number] = len(index)
    file = io.BytesIO()
    np.savez(file, counts=counts, stamps=np.array(stamps))
    _keep(path, file.getvalue())
    return counts, stamps


def _read_counts(path: Path, shards: int) -> tuple[Indices, list[str]] | None:
    try:
        with np.load(io.BytesIO(_held(path)), allow_pickle=False) as held:
            counts, stamps = held["counts"].astype(np.int64), held["stamps"].tolist()
    except MemoryError:
        raise
    except Exception:  # it is not there, or damaged
        return None
    return (counts, stamps) if len(counts) == len(stamps) == shards else None


# The images of a split.

ENDINGS = "jpg;jpeg;png;webp"
NEAR = 1 << 16
"""Bytes between two files of a sample that are read rather than asked for apart."""


class ShardImages:
    """The images of a split by number, in the order of its shards. Labels are known when a sample is read."""

    class_names: Sequence[str] | None = None
    targets: Sequence[int] | None = None

    def __init__(self, config: DataConfig, split: str, mode: str) -> None:
        self._mode, self._images = mode, (config.image_column or ENDINGS).lower().split(";")
        self._places, said, self._field = find_split(config, split)
        self.counts, self._stamps = count_samples(self._places)
        self._ends = np.cumsum(self.counts)
        self._indexes: dict[int, ShardIndex] = {}
        if not len(self):
            raise DataError(f"the {len(self._places)} shards of split {split!r} have no samples")
        if said not in (None, len(self)):
            logger.warning("split %r has %d images, not %s as it says", split, len(self), said)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> JsonDict:
        return {**self.__dict__, "_indexes": {}}

    def order(self, seed: int, epoch: int, repeats: int = 1) -> WindowOrder:
        """Return the order of an epoch."""
        return WindowOrder(self.counts, seed, epoch, repeats)

    def read(self, index: int) -> tuple[Image.Image, int]:
        shard, files, ending = self._files(index)
        kind = "json" if self._field else "cls"
        if kind not in files:
            raise DataError(f"has no label: its files end in {', '.join(files)}, and not in {kind}")
        content, label = self._contents(shard, files[ending], files[kind])
        with Image.open(io.BytesIO(content)) as image:
            return image.convert(self._mode), self._label(label)

    def header(self, index: int) -> Header:
        shard, files, ending = self._files(index)
        with Image.open(io.BytesIO(self._contents(shard, files[ending])[0])) as image:
            return Header.of(image)

    def path(self, index: int) -> str:
        shard, sample = self._find(index)
        return f"{self._places[shard]}: {self._index(shard).key(sample)}"

    def _files(self, index: int) -> tuple[int, dict[str, tuple[int, int]], str]:
        """Return the shard of a sample, where each of its files begins, and its size, and the ending of the image."""
        shard, sample = self._find(index)
        files = self._index(shard).files(sample)
        for ending in self._images:
            if ending in files:
                return shard, files, ending
        raise DataError(
            f"has no image: its files end in {', '.join(files)}, and not in {', '.join(self._images)}"
        )

    def _find(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, "right"))
        return shard, index - int(self._ends[shard] - self.counts[shard])

    def _index(self, shard: int) -> ShardIndex:
        """Return the index of a shard; those of a window are kept."""
        found = self._indexes.pop(shard, None)
        if found is None:
            found = find_index(self._places[shard], self._stamps[shard])[0]
            while len(self._indexes) > WINDOW:
                self._indexes.pop(next(iter(self._indexes)))
        self._indexes[shard] = found
        return found

    def _contents(self, shard: int, *ranges: tuple[int, int]) -> list[bytes]:
        """Return the content of files of one sample: by one read where they lie close to each other."""
        place, stamp = self._places[shard], self._stamps[shard]
        begin, end = min(start for start, _ in ranges), max(start + size for start, size in ranges)
        together = end - begin <= sum(size for _, size in ranges) + NEAR
        with _reached(place):
            store = store_of(place)
            if not together:
                return [store.read(place, start, size, stamp) for start, size in ranges]
            content = store.read(place, begin, end - begin, stamp)
        return [content[start - begin : start - begin + size] for start, size in ranges]

    def _label(self, content: bytes) -> int:
        fields: Any = None if self._field is None else json.loads(content)
        found = content if self._field is None else fields
        for word in self._field.split(".") if self._field else ():
            if not isinstance(found, dict) or word not in found:
                raise DataError(
                    f"its .json has no field {self._field}, only {', '.join(sorted(fields))}: set data.label_column"
                )
            found = found[word]
        label = int(found)
        if label < 0:
            raise DataError(f"has the label {label}")
        return label
