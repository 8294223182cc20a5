"""A folder of class folders: each real file once, however many links lead to it, labeled by its folder's name."""

from __future__ import annotations

import io
import itertools
import logging
import os
import re
import stat
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

from PIL import ExifTags, Image, UnidentifiedImageError
from pydantic import BaseModel
from torchvision.datasets.folder import IMG_EXTENSIONS

from ...checkpoints.atomic import write_bytes
from ...checkpoints.files import open_regular
from ...checkpoints.report import some
from ...models.errors import DataError, GraftError

# One face for the map-style data sets of timm and torchvision: read an image, name it, list the labels.

UNLABELED = -1
"""The label of an image that has none."""


class Header(NamedTuple):
    """The description of an image in its file, read before the image is decoded; `kind` is its format.

    `turned` is whether its EXIF orientation is not upright, which no loader heeds.
    """

    kind: str | None
    mode: str
    size: tuple[int, int]
    turned: bool = False

    @classmethod
    def of(cls, image: Image.Image) -> Header:
        exif = image.getexif() if "exif" in image.info else {}  # a PNG without one would be decoded for it
        return cls(image.format, image.mode, image.size, exif.get(ExifTags.Base.Orientation, 1) != 1)


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file, not decoded yet. Raises DataError where it is no regular file, and whatever Pillow does."""
    with _open(path) as file:
        try:
            image = Image.open(file)
        except UnidentifiedImageError as error:
            empty = not file.seek(0, os.SEEK_END)
            raise DataError(f"{path} {'is empty' if empty else 'is no image that can be read'}") from error
        with image:
            yield image


WHOLE = 4 << 20
"""Bytes up to which an image file is read at once."""


def _open(path: str | Path) -> BinaryIO:
    """Open an image by one `open` and one `fstat`: where millions are read, each further question to a shared disk
    counts. Only what cannot be opened so is looked at closely."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError):
        return open_regular(Path(path), refusal=DataError)  # says why
    try:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_size <= WHOLE:
            return io.BytesIO(_read(descriptor, status.st_size))
    finally:
        os.close(descriptor)
    return open_regular(Path(path), refusal=DataError)


def _read(descriptor: int, size: int) -> bytes:
    """Return the bytes of a file of that size: one call on a local disk, several where the system reads in pieces."""
    data = os.read(descriptor, size + 1)
    while len(data) < size and (more := os.read(descriptor, size - len(data))):
        data += more
    return data


class ImageSource(Protocol):
    """Images that are read by index; nothing is decoded before `read`.

    `targets` are the labels where they are known without reading, `UNLABELED` for images in no class folder.
    """

    @property
    def targets(self) -> Sequence[int] | None: ...
    @property
    def class_names(self) -> Sequence[str] | None: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> tuple[Image.Image, int]: ...
    def header(self, index: int) -> Header: ...
    def path(self, index: int) -> str: ...


class ReaderSource:
    """A timm reader (tar). timm's own data set replaces a bad image silently; this one fails."""

    def __init__(self, reader: Any, mode: str) -> None:
        self._reader = reader
        self._mode = mode
        names: tuple[str, ...] = tuple(
            getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or ()
        )
        self._flat = names == ("",)  # timm takes a folder without class folders for one class
        self.class_names: Sequence[str] | None = None if self._flat else names or None
        self.targets: Sequence[int] | None = (
            [UNLABELED] * len(reader) if self._flat else _reader_targets(reader)
        )

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, index: int) -> tuple[Image.Image, int]:
        stream, target, *_ = self._reader[index]
        with stream, Image.open(stream) as image:
            return image.convert(self._mode), UNLABELED if self._flat else int(target)

    def header(self, index: int) -> Header:
        stream = self._reader[index][0]
        with stream, Image.open(stream) as image:
            return Header.of(image)

    def path(self, index: int) -> str:
        return str(self._reader.filename(index, absolute=True))


def _reader_targets(reader: Any) -> Sequence[int] | None:
    if hasattr(reader, "iter_targets"):
        return [int(target) for target in reader.iter_targets()]
    if hasattr(reader, "targets"):  # of tar files
        return [int(target) for target in reader.targets]
    samples = getattr(reader, "samples", None)
    return None if samples is None else [int(sample[1]) for sample in samples]


class TorchvisionSource:
    """A torchvision data set that gives (PIL image, label)."""

    def __init__(self, dataset: Any, mode: str) -> None:
        if hasattr(dataset, "loader"):  # of files
            dataset.loader = partial(_load, mode)
        self._dataset = dataset
        self._mode = mode
        names = getattr(dataset, "classes", None)
        self.class_names: Sequence[str] | None = None if names is None else tuple(map(_name, names))
        targets = getattr(dataset, "targets", None)
        self.targets: Sequence[int] | None = None if targets is None else [int(target) for target in targets]

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, target = self._dataset[index]
        converted: Image.Image = image.convert(self._mode)
        return converted, int(target)

    def header(self, index: int) -> Header:
        return Header.of(self._dataset[index][0])

    def path(self, index: int) -> str:
        files = getattr(self._dataset, "samples", None)
        return f"sample {index}" if files is None else str(files[index][0])


def _load(mode: str, path: str) -> Image.Image:
    with open_image(path) as image:
        return image.convert(mode)


def _name(name: Any) -> str:
    """Return a class by its name, or by its synonyms as ImageNet has them."""
    return name if isinstance(name, str) else ", ".join(map(str, name))


class SourceView:
    """Images of another source: those at `indices`, in that order, and with the label of each in `labels`.

    Without `indices` these are all images; a label that is not in `labels` stays as it is.
    """

    def __init__(
        self,
        source: ImageSource,
        class_names: Sequence[str] | None,
        indices: Sequence[int] | None = None,
        labels: Mapping[int, int] | None = None,
    ) -> None:
        self.class_names = class_names
        self._source = source
        self._indices = range(len(source)) if indices is None else indices
        self._labels = labels or {}
        own = source.targets
        self.targets = None if own is None else [self._label(own[index]) for index in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, target = self._source.read(self._indices[index])
        return image, self._label(target)

    def header(self, index: int) -> Header:
        return self._source.header(self._indices[index])

    def path(self, index: int) -> str:
        return self._source.path(self._indices[index])

    def _label(self, target: int) -> int:
        return self._labels.get(target, target)


logger = logging.getLogger(__name__)

IMAGE_TYPES = IMG_EXTENSIONS
"""Endings of the files that are read as images; timm alone reads the first three kinds."""
NAMED = 5
"""How many of a kind a warning names."""
SETTLING = 10 * 10**9
"""Nanoseconds after a change of a folder in which another one may leave its times as they are: file systems count in
steps of up to two seconds, by clocks of their own."""
Key = tuple[int, int]
"""Device and number of a file, which all of its names share."""


class Seen(NamedTuple):
    """What the system says of a folder. Its times change when an entry comes, goes or is renamed."""

    device: int
    number: int
    modified: int
    changed: int

    @property
    def key(self) -> Key | None:
        """None where the file system does not number its files."""
        return (self.device, self.number) if self.number else None


@dataclass
class Found:
    """The images below `root`, in natural order of their paths. Links are followed where they lead to what is not there
    already."""

    root: Path
    files: list[str] = field(default_factory=list)
    folders: set[Key] = field(default_factory=set)
    linked: bool = False
    """True if some files are links."""
    left_out: list[str] = field(default_factory=list)
    """Links to folders and files that are there already."""
    seen: dict[str, Seen] = field(default_factory=dict)
    """The folders, each as it was before it was looked through."""
    settled: bool = True
    """Whether there are the same images as long as the folders stay as they were."""
    kept: bool = False
    """Whether the list is an earlier one."""
    numbers: set[Key] | None = None
    """The numbers of all files, where they are known."""

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the folders that images lie in, in natural order; none where all lie in `root` itself."""
        names = {self.class_of(path) for path in self.files} - {""}
        return tuple(sorted(names, key=natural_order))

    def class_of(self, path: str) -> str:
        """Return the name of the folder that an image lies in, "" for `root` itself."""
        parent = path.rpartition(os.sep)[0]
        return "" if parent == str(self.root) else parent.rpartition(os.sep)[2]

    def keys(self) -> set[Key]:
        """Return the numbers of all files that are there."""
        if self.numbers is None:
            self.numbers = {key for path in self.files if (key := _key(path)) is not None}
        return self.numbers


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Return what sorts 2 before 10 and heeds no case, as timm does; names that are equal so have an order, too."""
    parts: list[str | int] = list(re.split(r"(\d+)", name.lower()))
    parts[1::2] = map(int, parts[1::2])
    return parts, name


_listed: ContextVar[Mapping[Path, Found]] = ContextVar("_listed", default={})  # noqa: B039 - nobody writes into it


@contextmanager
def listed(known: Iterable[Found]) -> Iterator[None]:
    """Let `find_images` return these within the block, without a look at their folders."""
    token = _listed.set({found.root: found for found in known})
    try:
        yield
    finally:
        _listed.reset(token)


def find_images(root: Path) -> Found:
    """Look through `root`. A folder or file in it is taken before a link to it, and of several links the
    first."""
    known = _listed.get().get(root)
    if known is not None:
        return known
    found, began = Found(root), time.time_ns()
    files: list[str] = []
    folders = [str(root)]
    while folders:
        linked_folders: list[str] = []
        for folder in folders:
            _walk(found, folder, files, linked_folders)
        folders = sorted(linked_folders, key=natural_order)
    if files:
        _add_links(found, sorted(files, key=natural_order))
    found.files.sort(key=natural_order)
    last = max((max(seen.modified, seen.changed) for seen in found.seen.values()), default=began)
    found.settled &= last < began - SETTLING
    return found


def _walk(found: Found, folder: str, linked_files: list[str], linked_folders: list[str]) -> None:
    """Take what lies in `folder` and below it; links are only listed."""
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        if _is_again(found, folder):
            found.left_out.append(folder)
            continue
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    is_link = entry.is_symlink()
                    if _is_folder(entry):
                        (linked_folders if is_link else waiting).append(entry.path)
                        continue
                    found.settled &= not is_link  # what it leads to may change, and no folder here shows that
                    if Path(entry.name).suffix.lower() in IMAGE_TYPES:
                        (linked_files if is_link else found.files).append(entry.path)
        except OSError as error:
            found.settled = False
            logger.warning("%s cannot be read and is left out: %s", folder, error.strerror or error)


def _is_again(found: Found, folder: str) -> bool:
    """Note a folder as it is now; return whether it was noted by another name."""
    seen = _look_at(folder)
    if seen is None:
        return False
    found.seen[folder] = seen
    if seen.key in found.folders:
        return True
    if seen.key is not None:
        found.folders.add(seen.key)
    return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _add_links(found: Found, links: list[str]) -> None:
    """Add the files that are links, unless they lead to one that is there."""
    found.linked = True
    known = found.keys()
    for path in links:
        key = _key(path)
        if key in known:
            found.left_out.append(path)
            continue
        found.files.append(path)
        if key is not None:
            known.add(key)


def _look_at(path: str) -> Seen | None:
    """Return what the system says of a file or folder; None for what is not there."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return Seen(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def _key(path: str) -> Key | None:
    """Return the number of a file; None for what is not there, and where the file system does not number its files."""
    seen = _look_at(path)
    return None if seen is None else seen.key


# The index of a run: its list of images, for the other processes of the run and for its next start.

INDEX = "images.index"
"""Its name in the run folder."""
LARGEST = 1 << 30
"""Bytes of an index that is read, and of its text; a million images have some thirty million."""


class _Listing(BaseModel):
    """A `Found` as it is written. A name of a file is its bytes, one for each character."""

    root: str
    folders: list[tuple[str, Seen]]
    files: list[tuple[str, list[str]]]
    """The names of images that follow one another in one folder."""
    linked: bool
    left_out: list[str]
    numbers: list[Key] | None


class _Index(BaseModel):
    format: Literal[1]
    listings: list[_Listing]


def pack_lists(found: Iterable[Found]) -> bytes:
    """Return lists of images as bytes, for `unpack_lists`."""
    index = _Index(format=1, listings=[_plain(each) for each in found])
    return zlib.compress(index.model_dump_json().encode(), level=1)


def _plain(found: Found) -> _Listing:
    inside = len(os.path.join(found.root, ""))  # noqa: PTH118
    runs = itertools.groupby(
        (path[inside:].rpartition(os.sep) for path in found.files), key=lambda parts: parts[0]
    )
    return _Listing(
        root=_as_text(str(found.root)),
        folders=[(_as_text(path[inside:]), seen) for path, seen in found.seen.items()],
        files=[(_as_text(folder), [_as_text(parts[2]) for parts in run]) for folder, run in runs],
        linked=found.linked,
        left_out=[_as_text(path[inside:]) for path in found.left_out],
        numbers=None if found.numbers is None else sorted(found.numbers),
    )


def unpack_lists(data: bytes, roots: Sequence[Path] | None = None, *, limit: int = 0) -> list[Found]:
    """Return the lists that `pack_lists` packed, below other `roots` if they are given.

    Raises DataError: the bytes are damaged, have a text of more than `limit` bytes, or a name that leads out of its
    folder.
    """
    try:
        text = zlib.decompressobj().decompress(data, limit)
        listings = _Index.model_validate_json(text).listings
        places = roots or [Path(_as_name(each.root)) for each in listings]
        return [_below(place, each) for place, each in zip(places, listings, strict=True)]
    except (ValueError, zlib.error) as error:
        raise DataError("the index of the images is damaged") from error


def _below(root: Path, listing: _Listing) -> Found:
    names = [_as_name(folder) for folder, _ in listing.folders]
    _check_inside(*names, *map(_as_name, listing.left_out))
    found = Found(root, linked=listing.linked, kept=True)
    found.seen = {_join(root, name): seen for name, (_, seen) in zip(names, listing.folders, strict=True)}
    found.folders = {seen.key for seen in found.seen.values() if seen.key is not None}
    found.left_out = [_join(root, _as_name(path)) for path in listing.left_out]
    found.numbers = None if listing.numbers is None else set(listing.numbers)
    for folder, files in listing.files:
        place = _join(root, _as_name(folder))
        if place not in found.seen:
            raise ValueError(f"{place} was not looked through")
        decoded = [_as_name(name) for name in files]
        if any(os.sep in name or not name for name in decoded):
            raise ValueError(f"{place} has a file that lies elsewhere")
        _check_inside(*decoded)
        found.files += [_join(place, name) for name in decoded]
    return found


def _check_inside(*paths: str) -> None:
    if any(path.startswith(os.sep) or ".." in Path(path).parts for path in paths):
        raise ValueError("a path leads out of its folder")


def _join(folder: str | Path, name: str) -> str:
    return os.path.join(folder, name) if name else str(folder)  # noqa: PTH118


def _as_text(name: str) -> str:
    return os.fsencode(name).decode("latin-1")


def _as_name(text: str) -> str:
    return os.fsdecode(text.encode("latin-1"))


def find_again(roots: Sequence[Path], index: Path) -> list[Found]:
    """Return the images of each root: those in the file `index` where no folder has changed since, else look."""
    kept = {found.root: found for found in read_index(index)}
    return [_unchanged(kept.get(root)) or find_images(root) for root in roots]


def read_index(path: Path) -> list[Found]:
    """Return the lists in a file; none where it is not there, or is damaged."""
    if not path.exists():
        return []
    try:
        with open_regular(path, refusal=DataError) as file:
            if file.seek(0, os.SEEK_END) > LARGEST:
                raise DataError(f"{path} has more than {LARGEST:,} bytes")
            file.seek(0)
            return unpack_lists(file.read(LARGEST), limit=LARGEST)
    except (GraftError, OSError) as error:
        logger.warning("%s is not used, and the folders are looked through again: %s", path, error)
        return []


def _unchanged(found: Found | None) -> Found | None:
    """Return a list whose folders are as they were. Their device may have another number, as after a restart."""
    if found is None:
        return None
    now = {path: _look_at(path) for path in found.seen}
    if any(each is None or each[1:] != found.seen[path][1:] for path, each in now.items()):
        return None
    found.seen, found.numbers = {path: each for path, each in now.items() if each is not None}, None
    found.folders = {each.key for each in found.seen.values() if each.key is not None}
    return found


def keep_index(found: Sequence[Found], path: Path) -> None:
    """Write the lists that a next start may use, if there are new ones. Raises WriteFailedError."""
    settled = [each for each in found if each.settled]
    if not all(each.kept for each in settled):
        write_bytes(path, pack_lists(settled))


def number_together(found: Sequence[Found]) -> None:
    """Find out now what `count_shared` of two lists asks for."""
    if any(_may_share(*pair) for pair in itertools.combinations(found, 2)):
        for each in found:
            each.keys()


def _may_share(one: Found, other: Found) -> bool:
    return one.linked or other.linked or bool(one.folders & other.folders)


def count_shared(one: Found, other: Found) -> int:
    """Return how many images of `one` are images of `other`."""
    return len(one.keys() & other.keys()) if _may_share(one, other) else 0


class FolderImages:
    """The images of a folder, numbered by the names of their folders, in natural order of their paths."""

    def __init__(self, found: Found, mode: str) -> None:
        """Look for images. Raises DataError: there is no image."""
        if not found.files:
            raise DataError(
                f"Found 0 images in {found.root} and below it; the names of images end in {', '.join(IMAGE_TYPES)}"
            )
        self.found = found
        self._mode = mode
        self._files = _classified(found)
        names = found.class_names()
        numbers = {name: number for number, name in enumerate(names)} or {"": UNLABELED}
        self.class_names: Sequence[str] | None = names or None
        self.targets: list[int] = [numbers[found.class_of(path)] for path in self._files]
        _tell(found, self._files)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> tuple[Image.Image, int]:
        with open_image(self._files[index]) as image:
            return image.convert(self._mode), self.targets[index]

    def header(self, index: int) -> Header:
        with open_image(self._files[index]) as image:
            return Header.of(image)

    def path(self, index: int) -> str:
        return self._files[index]

    def size(self, index: int) -> int:
        return os.stat(self._files[index]).st_size  # noqa: PTH116 - for each image of each epoch


def _classified(found: Found) -> list[str]:
    """Return all images where none lies in a class folder, else those that do."""
    kept = [path for path in found.files if found.class_of(path)]
    if kept and len(kept) < len(found.files):
        logger.warning(
            "%s: %d images beside the class folders are left out", found.root, len(found.files) - len(kept)
        )
    return kept or found.files


def _tell(found: Found, files: Collection[str]) -> None:
    """Warn of links that are left out, and of classes that lie in several places."""
    if found.left_out:
        logger.warning(
            "%s: %d links lead to images that are there already and are left out: %s",
            found.root, len(found.left_out), some(sorted(found.left_out), NAMED),
        )  # fmt: skip
    places: dict[str, set[str]] = {}
    for folder in map(Path, {path.rpartition(os.sep)[0] for path in files}):
        places.setdefault(folder.name, set()).add(str(folder.relative_to(found.root)))
    several = [
        f"{name} ({some(sorted(each), NAMED)})" for name, each in sorted(places.items()) if len(each) > 1
    ]
    if several:
        logger.warning(
            "%s: class folders of one name in several places are one class: %s",
            found.root, "; ".join(several[:NAMED]),
        )  # fmt: skip
