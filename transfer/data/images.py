"""One face for the map-style data sets of timm and torchvision: read an image, name it, list the labels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import ExifTags, Image, UnidentifiedImageError

from ...checkpoints.files import open_regular
from ...models.errors import DataError

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
