"""The images of `data.views` kept as bytes (`data.keep_views`): each is decoded and augmented once, then read.

    DIR/<digest of all that the pixels depend on>/view-000.rows

The file of a view has a row for each sample, and a hole where none was written. A row is a header, then the image
(C, H, W), one byte a value. The header is written last. It holds a checksum of the sample's name and size, its label,
its bytes and what the file is of: a row that is missing, cut, damaged or of another image or view is made again. All
processes write the same bytes into a row, so none waits for another. A row begins where a page of memory does: two
machines never write one page.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ...checkpoints.atomic import WriteFailedError, write_shared
from ...checkpoints.files import digest, nearest_folder, open_regular
from ...checkpoints.preprocessing import Preprocessing
from ...models.errors import ConfigError, DataError, JsonDict, gibibytes
from ..config import DataConfig
from ..setting import rule_of

logger = logging.getLogger(__name__)

FORMAT = 2
PAGE = 4096
HEADER = struct.Struct("<Iq")
"""The checksum, 0 in a hole, and the label."""
IMAGES = ("dataset", "train_split", "image_column", "label_column", "classes", "train_samples", "label_seed")
"""The settings that say which image a sample is."""
CODE = ("pillow", "timm", "torch", "torchvision")
"""The packages that decode and augment."""


class KeptViews:
    """The kept images of one training set, in all its views."""

    def __init__(self, config: DataConfig, spec: Preprocessing, *, seed: int, samples: int) -> None:
        self._root = Path(str(config.keep_views))
        self._described = _describe(config, spec, seed, samples)
        self.folder = self._root / digest(self._described)
        self._shape, self._samples = spec.input_size, samples
        self._size = HEADER.size + math.prod(self._shape)
        self._row = -(-self._size // PAGE) * PAGE
        self._prefix = "" if config.data_path is None else os.path.join(config.data_path, "")  # noqa: PTH118
        self._open: dict[int, BinaryIO] = {}

    def __getstate__(self) -> JsonDict:
        return {**self.__dict__, "_open": {}}

    def find(self, view: int, index: int, name: str, label: int | None) -> tuple[Tensor, int] | None:
        """Return the image of a sample in a view, (C, H, W) uint8, and its label; None if it must be made.

        `label` is given where it is known without reading.

        Raises DataError: the disk does not give what is there.
        """
        path = self.path(view)
        with self._named(path):
            if view not in self._open:
                if not path.exists():
                    return None
                self._open[view] = open_regular(path, refusal=DataError)
            row = bytearray(os.pread(self._open[view].fileno(), self._size, index * self._row))
        if len(row) < self._size:
            return None
        checksum, kept = HEADER.unpack_from(row)
        label = kept if label is None else label
        if checksum == 0:
            return None
        if checksum != self._checksum(path, name, label, memoryview(row)[HEADER.size :]):
            logger.warning(
                "data.keep_views: %s is damaged or of another image or view in %s; it is made again",
                name,
                path,
            )
            return None
        return torch.frombuffer(row, dtype=torch.uint8, offset=HEADER.size).view(self._shape), label

    def keep(self, view: int, index: int, name: str, image: Tensor, label: int) -> None:
        """Write the image (C, H, W) of a sample in a view, and its label. Raises DataError: it cannot be written."""
        path, place = self.path(view), index * self._row
        pixels = image.contiguous().numpy().data.cast("B")
        with self._named(path):
            if not path.exists():
                write_shared(self.folder / "about.json", json.dumps(self._described).encode(), replace=False)
                path.touch()
            with path.open("r+b") as file:
                file.seek(place + HEADER.size)
                file.write(pixels)
                file.seek(place)
                file.write(HEADER.pack(self._checksum(path, name, label, pixels), label))

    def path(self, view: int) -> Path:
        """Return the file of a view."""
        return self.folder / f"view-{view:03d}.rows"

    def count_bytes(self, views: Iterable[int]) -> tuple[int, int]:
        """Return the bytes of some views, and how many of them are on the disk."""
        paths = [self.path(view) for view in views]
        there = sum(path.stat().st_blocks * 512 for path in paths if path.exists())
        return len(paths) * self._samples * self._row, there

    def find_lack(self, views: Iterable[int]) -> ConfigError | None:
        """Return the error of a disk that has no room for what is not there of some views."""
        whole, there = self.count_bytes(views)
        free = shutil.disk_usage(nearest_folder(self._root)).free
        if whole - there <= free:
            return None
        return ConfigError(
            f"data.keep_views={self._root} lacks {gibibytes(whole - there)}, more than the {gibibytes(free)} that "
            "are free there: make room, name another folder, or lower data.views"
        )

    def _checksum(self, path: Path, name: str, label: int, pixels: memoryview) -> int:
        """Return a checksum above 0."""
        file = path.relative_to(self._root)
        key = f"{file} {label} {name.removeprefix(self._prefix)}".encode("utf-8", "surrogatepass")
        return zlib.crc32(pixels, zlib.crc32(key)) or 1

    @contextmanager
    def _named(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, WriteFailedError) as error:
            cause = error.__cause__ or error
            raise DataError(
                f"data.keep_views: {path} cannot be read or written ({getattr(cause, 'strerror', cause)}): make room, "
                "name a folder in which you may write, or leave data.keep_views out"
            ) from error


def _describe(config: DataConfig, spec: Preprocessing, seed: int, samples: int) -> JsonDict:
    """Return all that the pixels of a sample depend on, beside its file."""
    return {
        "format": FORMAT,
        "images": {**config.model_dump(mode="json", include=set(IMAGES)), "samples": samples},
        **spec.described(),
        "augmentation": describe_drawn(config, seed),
        "code": {name: version(name) for name in CODE},
    }


def describe_drawn(config: DataConfig, seed: int) -> JsonDict | None:
    """Return the settings of the augmentation with its seed; None for images that are not augmented."""
    if config.views == 0:
        return None
    drawn = {name for name, field in type(config).model_fields.items() if rule_of(field).drawn}
    return {**config.model_dump(mode="json", include=drawn), "seed": seed}
