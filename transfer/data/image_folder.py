"""A folder of class folders: each real file once, however many links lead to it, labeled by its folder's name."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import ExifTags, Image, UnidentifiedImageError
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from ...checkpoints.files import open_regular
from ...checkpoints.report import some
from ...models.errors import DataError

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
    with open_regular(Path(path), refusal=DataError) as file:
        try:
            image = Image.open(file)
        except UnidentifiedImageError as error:
            empty = not file.seek(0, os.SEEK_END)
            raise DataError(f"{path} {'is empty' if empty else 'is no image that can be read'}") from error
        with image:
            yield image


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
Key = tuple[int, int]
"""Device and number of a file, which all of its names share."""


@dataclass
class Found:
    """The images below `root`, in no order. Links are followed where they lead to what is not there already."""

    root: Path
    files: list[str] = field(default_factory=list)
    folders: set[Key] = field(default_factory=set)
    linked: bool = False
    """True if some files are links."""
    left_out: list[str] = field(default_factory=list)
    """Links to folders and files that are there already."""

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the folders that images lie in, in natural order; none where all lie in `root` itself."""
        names = {self.class_of(path) for path in self.files} - {""}
        return tuple(sorted(names, key=natural_key))

    def class_of(self, path: str) -> str:
        """Return the name of the folder that an image lies in, "" for `root` itself."""
        parent = path.rpartition(os.sep)[0]
        return "" if parent == str(self.root) else parent.rpartition(os.sep)[2]

    def keys(self) -> set[Key]:
        """Return the numbers of all files that are there."""
        return {key for path in self.files if (key := _key(path)) is not None}


def find_images(root: Path) -> Found:
    """Look through `root`. A folder or file in it is taken before a link to it, and of several links the
    first."""
    found = Found(root)
    files: list[str] = []
    folders = [str(root)]
    while folders:
        linked_folders: list[str] = []
        for folder in folders:
            _walk(found, folder, files, linked_folders)
        folders = sorted(linked_folders, key=natural_key)
    if files:
        _add_links(found, sorted(files, key=natural_key))
    return found


def _walk(found: Found, folder: str, linked_files: list[str], linked_folders: list[str]) -> None:
    """Take what lies in `folder` and below it; links are only listed."""
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        key = _key(folder)
        if key in found.folders:
            found.left_out.append(folder)
            continue
        if key is not None:
            found.folders.add(key)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _is_folder(entry):
                        (linked_folders if entry.is_symlink() else waiting).append(entry.path)
                    elif Path(entry.name).suffix.lower() in IMAGE_TYPES:
                        (linked_files if entry.is_symlink() else found.files).append(entry.path)
        except OSError as error:
            logger.warning("%s cannot be read and is left out: %s", folder, error.strerror or error)


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


def _key(path: str) -> Key | None:
    """Return the number of a file; None for what is not there, and where the file system does not number its files."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None


def count_shared(one: Found, other: Found) -> int:
    """Return how many images of `one` are images of `other`."""
    if not (one.linked or other.linked or one.folders & other.folders):
        return 0
    return len(one.keys() & other.keys())


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
        self._files = sorted(_classified(found), key=natural_key)
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
    for folder in {Path(path.rpartition(os.sep)[0]) for path in files}:
        places.setdefault(folder.name, set()).add(str(folder.relative_to(found.root)))
    several = [
        f"{name} ({some(sorted(each), NAMED)})" for name, each in sorted(places.items()) if len(each) > 1
    ]
    if several:
        logger.warning(
            "%s: class folders of one name in several places are one class: %s",
            found.root, "; ".join(several[:NAMED]),
        )  # fmt: skip
