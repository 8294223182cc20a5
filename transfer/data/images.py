"""One face for the map-style data sets of timm and torchvision: read an image, name it, list the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from PIL import Image


class ImageSource(Protocol):
    """Images that are read by index; nothing is decoded before `read`."""

    @property
    def targets(self) -> Sequence[int] | None: ...
    @property
    def class_names(self) -> Sequence[str] | None: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> tuple[Image.Image, int]: ...
    def path(self, index: int) -> str: ...


class ReaderSource:
    """A timm reader (folder, tar, hfds). timm's own data set replaces a bad image silently; this one fails."""

    def __init__(self, reader: Any, mode: str) -> None:
        self._reader = reader
        self._mode = mode
        self.class_names: Sequence[str] | None = tuple(getattr(reader, "class_to_idx", ())) or None
        self.targets: Sequence[int] | None = _reader_targets(reader)

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, index: int) -> tuple[Image.Image, int]:
        stream, target, *_ = self._reader[index]
        with stream, Image.open(stream) as image:
            return image.convert(self._mode), int(target)

    def path(self, index: int) -> str:
        return str(self._reader.filename(index, absolute=True))


def _reader_targets(reader: Any) -> Sequence[int] | None:
    if hasattr(reader, "iter_targets"):
        return [int(target) for target in reader.iter_targets()]
    samples = getattr(reader, "samples", None)
    return None if samples is None else [int(sample[1]) for sample in samples]


class TorchvisionSource:
    """A torchvision data set that gives (PIL image, label)."""

    def __init__(self, dataset: Any, mode: str) -> None:
        self._dataset = dataset
        self._mode = mode
        self.class_names: Sequence[str] | None = getattr(dataset, "classes", None)
        targets = getattr(dataset, "targets", None)
        self.targets: Sequence[int] | None = None if targets is None else [int(target) for target in targets]

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, target = self._dataset[index]
        return cast(Image.Image, image.convert(self._mode)), int(target)

    def path(self, index: int) -> str:
        files = getattr(self._dataset, "samples", None)
        return f"sample {index}" if files is None else str(files[index][0])
