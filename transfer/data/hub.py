"""Data sets of Hugging Face (`hfds/NAME`): of the hub, of a folder of files, or saved by `save_to_disk`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...checkpoints.files import open_regular
from ...models.errors import DataError
from ..config import DataConfig
from .columns import Columns, find_columns
from .images import UNLABELED, Header
from .splits import synonyms
from .steps import reason_of

SAVED_SPLITS, SAVED_ONE = "dataset_dict.json", "state.json"
"""What `save_to_disk` leaves of a set of splits, and of one."""


class HubImages:
    """A table of the package datasets: images are decoded one by one, labels are read at once.

    `vocabulary` numbers labels that are names.
    """

    def __init__(
        self, table: Any, columns: Columns, mode: str, name: str, vocabulary: Sequence[str] | None
    ) -> None:
        import datasets

        images = table.select_columns([columns.image])
        self._images = images.cast_column(columns.image, datasets.Image(decode=False))
        self._column, self._mode, self._name = columns.image, mode, name
        self.class_names: Sequence[str] | None = vocabulary
        labels = None if columns.label is None else table[columns.label][:]
        places = {each: place for place, each in enumerate(vocabulary or ())}
        self.targets: list[int] = (
            [UNLABELED] * len(table) if labels is None else [_number(label, places) for label in labels]
        )

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(io.BytesIO(self._content(index))) as image:
            return image.convert(self._mode), self.targets[index]

    def header(self, index: int) -> Header:
        with Image.open(io.BytesIO(self._content(index))) as image:
            return Header.of(image)

    def _content(self, index: int) -> bytes:
        stored = self._images[index][self._column]
        content: bytes | None = stored["bytes"]
        if content:
            return content
        with open_regular(Path(stored["path"]), refusal=DataError) as file:
            return file.read()

    def path(self, index: int) -> str:
        stored = self._images[index][self._column] or {}
        return f"{self._name}, row {index} ({stored.get('path') or 'without a path'})"


def open_hub(config: DataConfig, split: str, mode: str) -> HubImages:
    """Return the images of a split. Raises DataError: there is no such data set, split or column."""
    try:
        table = load_split(config, split)
        columns = find_columns(config, table.features)
        vocabulary = None if columns.label is None else _vocabulary(config, columns.label, split, table)
        return HubImages(table, columns, mode, f"{config.dataset} {split}", vocabulary)
    except DataError:
        raise
    except Exception as error:  # of files, of the network, of the many ways to describe a table
        reason = reason_of(error)
        raise DataError(
            f"data.dataset={config.dataset}, split {split!r}, cannot be read: {reason}"
        ) from error


def load_split(config: DataConfig, split: str) -> Any:
    """Return a split, under its name or a synonym of it, or a part of one as in `train[:10%]`."""
    import datasets

    name = config.dataset.partition("/")[2]
    if (Path(name) / SAVED_SPLITS).is_file() or (Path(name) / SAVED_ONE).is_file():
        found = datasets.load_from_disk(name)
    elif any(sign in split for sign in "[+"):
        return datasets.load_dataset(name, split=split, cache_dir=config.data_path)
    else:
        found = datasets.load_dataset(name, cache_dir=config.data_path)
    splits = found if isinstance(found, Mapping) else {str(found.split or "train"): found}
    key = next((each for each in (split, *synonyms(split)) if each in splits), None)
    if key is None:
        raise DataError(f"{config.dataset} has no split {split!r}, only {', '.join(sorted(splits))}")
    return splits[key]


def stream_columns(config: DataConfig, split: str) -> Columns:
    """Return the columns of `hfids/NAME`, which the first image tells where the description of the set does not."""
    import datasets

    name = config.dataset.partition("/")[2]
    features = datasets.load_dataset_builder(name, cache_dir=config.data_path).info.features
    if features is None:
        stream = datasets.load_dataset(name, split=split, streaming=True, cache_dir=config.data_path)
        features = stream.features or dict.fromkeys(next(iter(stream)))
    columns = find_columns(config, features)
    if columns.label is None:
        raise DataError(
            f"{config.dataset} has no column that looks like labels, only {', '.join(sorted(features))}: "
            "set data.label_column, or read it with hfds/"
        )
    return columns


def _vocabulary(config: DataConfig, label: str, split: str, table: Any) -> Sequence[str] | None:
    """Return the names of the classes by number; those of the training split where labels are names."""
    feature = table.features[label]
    if hasattr(feature, "names"):
        return tuple(feature.names)
    if "string" not in feature.dtype:
        return None
    if split not in (config.train_split, *synonyms(config.train_split)):
        table = load_split(config, config.train_split)
    return tuple(sorted({name for name in table[label][:] if name is not None}))


def _number(label: Any, places: Mapping[str, int]) -> int:
    if label is None:
        return UNLABELED
    return places.get(label, UNLABELED) if isinstance(label, str) else int(label)
