"""Shards (`wds/...`): tar files whose samples are read by index, on this machine or by ranges over the network."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image

from ...checkpoints.files import is_url
from ...models.errors import DataError, JsonDict
from ..config import DataConfig
from .image_folder import Header
from .loading import SourceLostError, followed
from .sampler import WINDOW, Indices, WindowOrder
from .shard_index import (
    BLOCK,
    ShardIndex,
    cached,
    check_header,
    find_index,
    index_shard,
    keep,
)
from .shard_places import changed, load, reached, stamp_of, stamp_of_file, store_of

logger = logging.getLogger(__name__)

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
            with reached(place), store_of(place).stream(place) as file:
                if not is_url(place):
                    stamp_of_file(os.fstat(file.fileno()))
                splits = parse(file)["splits"]
                names = splits[split]["filenames"] if split in splits else None
        except SourceLostError as error:
            reasons.append(str(error))
            continue
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names) or not names:
            raise DataError(
                f"{place} names no shards of split {split!r}, only of {', '.join(sorted(splits))}"
            )
        return splits[split]
    form = json.dumps({"splits": {split: {"filenames": expand(NAMES)[:2]}}})
    raise DataError(
        f"data.dataset=wds has no shards of split {split!r}: {reasons[0]}; write an _info.json such as {form} beside "
        f"the shards, or name them, as in data.train_split='{NAMES}'"
    )


class Indexed(NamedTuple):
    """The number of samples of each shard, its stamp, and how many indexes were written."""

    counts: Indices
    stamps: npt.NDArray[np.bytes_]
    written: int


def count_samples(places: Sequence[str], readers: int = 1) -> Indexed:
    """Return the samples of shards, of which `readers` are read at a time; indexes that are missing are made.

    What was counted is kept. Shards of this machine are looked at again; those of the network when they are read.
    """
    stamps = ["" if is_url(place) else stamp_of(place) for place in places]
    kept = load(_counts_path(places, stamps))
    found = None if kept is None else _read_counts(kept, len(places))
    return found or _index_all(places, readers, lambda place: (find_index(place), False))


def index_split(config: DataConfig, split: str, *, aside: bool = False) -> Indexed:
    """Make the indexes of a split's shards, `aside` each shard or in the cache, unless they are there and as new.

    Raises DataError: the split names no shards, one cannot be read, or nothing can be written beside it.
    """
    places = find_split(config, split).places
    return _index_all(places, config.workers, partial(index_shard, aside=aside))


def _index_all(
    places: Sequence[str], readers: int, index: Callable[[str], tuple[ShardIndex, bool]]
) -> Indexed:
    def row(place: str) -> tuple[int, str, bool]:
        found, written = index(place)
        return len(found), found.stamp, written

    pool = ThreadPoolExecutor(max(1, readers))
    try:
        rows = list(followed(pool.map(row, places), len(places), "index of shards"))
    finally:
        pool.shutdown(cancel_futures=True)
    counts, stamps, written = zip(*rows, strict=True)
    packed = np.array([os.fsencode(stamp) for stamp in stamps])
    found = Indexed(np.array(counts, dtype=np.int64), packed, sum(written))
    file = io.BytesIO()
    np.savez(file, counts=found.counts, stamps=packed)
    keep(_counts_path(places, stamps), file.getvalue())
    return found


def _counts_path(places: Sequence[str], stamps: Sequence[str]) -> Path:
    known = ["" if is_url(place) else stamp for place, stamp in zip(places, stamps, strict=True)]
    return cached("counts", *places, *known)


def _read_counts(content: bytes, shards: int) -> Indexed | None:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as held:
            counts, stamps = held["counts"].astype(np.int64), held["stamps"].astype(np.bytes_)
    except Exception:  # it is damaged
        return None
    return Indexed(counts, stamps, 0) if len(counts) == len(stamps) == shards else None


# The images of a split.

ENDINGS = "jpg;jpeg;png;webp"
NEAR = 1 << 16
"""Bytes between two files of a sample that are read rather than asked for apart."""
REQUESTS = 16
"""Samples that a process asks a server for at the same time."""
_INDEXING = threading.Lock()
"""Held by the thread that looks for an index, so that one alone reads it."""
Sample = tuple[bytes, bytes]
"""The content of an image and of its label."""


class _Readers:
    """Threads that read samples ahead. Unlike those of an executor, they let a process end while a server is silent."""

    def __init__(self) -> None:
        self._asked = SimpleQueue[tuple[Future[Sample], Callable[[int], Sample], int]]()
        for _ in range(REQUESTS):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, fetch: Callable[[int], Sample], index: int) -> Future[Sample]:
        """Return what will have a sample, or why it cannot be read."""
        found = Future[Sample]()
        self._asked.put((found, fetch, index))
        return found

    def _work(self) -> None:
        while True:
            found, fetch, index = self._asked.get()
            if not found.set_running_or_notify_cancel():
                continue
            try:
                found.set_result(fetch(index))
            except BaseException as error:  # for the thread that waits
                found.set_exception(error)


@lru_cache(maxsize=1)
def _readers(process: int) -> _Readers:
    """Return what reads samples ahead in a process: threads do not live on in a forked one."""
    return _Readers()


class ShardImages:
    """The images of a split by number, in the order of its shards. Labels are known when a sample is read."""

    class_names: Sequence[str] | None = None
    targets: Sequence[int] | None = None

    def __init__(self, config: DataConfig, split: str, mode: str) -> None:
        self._mode, self._images = mode, (config.image_column or ENDINGS).lower().split(";")
        self._places, said, self._field = find_split(config, split)
        self.counts, self._stamps, _ = count_samples(self._places, config.workers)
        self._ends = np.cumsum(self.counts)
        self._indexes: dict[int, ShardIndex] = {}
        self._ahead: dict[int, Future[Sample]] = {}
        if not len(self):
            raise DataError(f"the {len(self._places)} shards of split {split!r} have no samples")
        if said not in (None, len(self)):
            logger.warning("split %r has %d images, not %s as it says", split, len(self), said)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> JsonDict:
        return {**self.__dict__, "_indexes": {}, "_ahead": {}}

    def shards(self) -> list[tuple[str, int]]:
        """Return the place of each shard and the number of its samples."""
        return list(zip(self._places, self.counts.tolist(), strict=True))

    def order(self, seed: int, epoch: int, repeats: int = 1) -> WindowOrder:
        """Return the order of an epoch."""
        return WindowOrder(self.counts, seed, epoch, repeats)

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Ask servers for the samples that `read` gives next. What was asked for before is forgotten."""
        for left in self._ahead.values():
            left.cancel()
        far = [index for index in indices if is_url(self._places[self._find(index)[0]])]
        self._ahead = {index: _readers(os.getpid()).submit(self._fetch, index) for index in far}

    def read(self, index: int) -> tuple[Image.Image, int]:
        asked = self._ahead.get(index)
        content, label = self._fetch(index) if asked is None else asked.result()
        with Image.open(io.BytesIO(content)) as image:
            return image.convert(self._mode), self._label(label)

    def _fetch(self, index: int) -> Sample:
        shard, files, ending = self._files(index)
        kind = "json" if self._field else "cls"
        if kind not in files:
            raise DataError(f"has no label: its files end in {', '.join(files)}, and not in {kind}")
        content, label = self._contents(shard, files[ending], files[kind])
        return content, label

    def header(self, index: int) -> Header:
        shard, files, ending = self._files(index)
        with Image.open(io.BytesIO(self._contents(shard, files[ending])[0])) as image:
            return Header.of(image)

    def path(self, index: int) -> str:
        shard, sample = self._find(index)
        return f"{self._places[shard]}: {self._index(shard).key(sample)}"

    def size(self, index: int) -> int:
        _, files, ending = self._files(index)
        return files[ending][1]

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
        with _INDEXING:
            found = self._indexes.pop(shard, None)
            if found is None:
                found = find_index(self._places[shard], self._stamp(shard))
                if len(found) != self.counts[shard]:
                    raise changed(self._places[shard])
                while len(self._indexes) > WINDOW:
                    self._indexes.pop(next(iter(self._indexes)))
            self._indexes[shard] = found
            return found

    def _stamp(self, shard: int) -> str:
        return os.fsdecode(self._stamps[shard])

    def _contents(self, shard: int, *files: tuple[int, int]) -> list[bytes]:
        """Return the content of files of one sample: by one read where they lie close to each other.

        Each is read with its header. Raises SourceLostError: there is no file of that size.
        """
        place, stamp = self._places[shard], self._stamp(shard)
        ranges = [(start - BLOCK, size + BLOCK) for start, size in files]
        begin, end = min(start for start, _ in ranges), max(start + size for start, size in ranges)
        with reached(place):
            store = store_of(place)
            if end - begin <= sum(size for _, size in ranges) + NEAR:
                content = store.read(place, begin, end - begin, stamp)
                parts = [content[start - begin : start - begin + size] for start, size in ranges]
            else:
                parts = [store.read(place, start, size, stamp) for start, size in ranges]
        for part, (_, size) in zip(parts, files, strict=True):
            check_header(place, part[:BLOCK], size)
        return [part[BLOCK:] for part in parts]

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
