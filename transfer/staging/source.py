"""Find what to copy of a data set to a node's disk: its files, their sizes, and by what a copy of them is known."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ...models.errors import ConfigError, DataError
from ..config import DataConfig
from ..data.archives import SPLITS, count_images, is_packed, on_disk
from ..data.image_folder import find_images
from ..data.splits import split_folder

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
    """Which setting names `root`."""
    packed: bool = False
    """Whether the one piece is an archive to be unpacked."""

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
