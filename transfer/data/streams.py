"""Streamed data sets (hfids, tfds): images that come in an order of their own, not by index.

The order is timm's, seeded by (seed, epoch) and by the number of ranks and loader processes. A resumed epoch
is fast-forwarded: the batches that were seen are read again and discarded, which takes the time of reading
them.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.mixup import Mixup
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ...checkpoints.files import open_regular
from ...models.errors import ConfigError, DataError, Json
from ..config import DataConfig
from .augment import Transform, epoch_repeats, mix, reason_of, seed_generators
from .digits import synonyms
from .image_folder import UNLABELED, Header
from .loading import (
    BadImage,
    BadImages,
    Batch,
    Loaded,
    Ready,
    cause,
    create_loader,
    failed,
    guarded,
    out_of_memory,
)
from .sampler import MIXING, SAMPLE, derive_seed, preserved

# Which columns of a table hold the images and their labels: by the settings, else by usual names and kinds.

logger = logging.getLogger(__name__)

IMAGES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
LABELS = ("label", "labels", "fine_label", "class", "target", "cls", "category", "coarse_label")


class Columns(NamedTuple):
    """Names of two columns; `label` is None without labels."""

    image: str
    label: str | None


def find_columns(config: DataConfig, features: Json) -> Columns:
    """Return the columns of a data set with these `features` (of the package datasets, by name).

    Raises DataError: a setting names none of them, none holds images, or the labels are no numbers and no names.
    """
    image = _find(config, "image_column", features, IMAGES, "Image")
    if image is None:
        raise DataError(
            f"{config.dataset} has no column that looks like images, only {_listed(features)}: "
            "set data.image_column"
        )
    label = _find(config, "label_column", features, LABELS, "ClassLabel")
    if label is not None and not is_label(features[label]):
        raise DataError(
            f"data.label_column={label} of {config.dataset} holds {features[label]}, not one label an image; "
            f"its columns are {_listed(features)}"
        )
    logger.info("%s: images from column %s, labels from %s", config.dataset, image, label or "none")
    return Columns(image, label)


def is_label(feature: Any) -> bool:
    """Return whether a column holds one class an image: a number or a name."""
    return getattr(feature, "dtype", "").startswith(("int", "uint", "string", "large_string", "bool"))


def _find(config: DataConfig, setting: str, features: Json, names: tuple[str, ...], kind: str) -> str | None:
    wanted = getattr(config, setting)
    if wanted is not None:
        if wanted not in features:
            raise DataError(
                f"data.{setting}={wanted} is no column of {config.dataset}; there are {_listed(features)}"
            )
        return str(wanted)
    named = [name for name in names if name in features]
    of_kind = [name for name, feature in features.items() if type(feature).__name__ == kind]
    return next(iter([name for name in named if name in of_kind] or named or of_kind), None)


def _listed(features: Json) -> str:
    return ", ".join(sorted(features))


# Data sets of Hugging Face (`hfds/NAME`): of the hub, of a folder of files, or saved by `save_to_disk`.

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


class StreamBatches(IterableDataset[Batch]):
    """Batches of a stream; an image's augmentation is seeded by (seed, epoch, process, place in it)."""

    def __init__(self, stream: Any, transform: Transform, batch_size: int, seed: int, rank: int) -> None:
        self.epoch = 0
        self._stream = stream
        self._transform = transform
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank

    def __iter__(self) -> Iterator[Batch]:
        rows: list[Ready] = []
        bad: list[BadImage] = []
        example: Ready | None = None
        try:
            for row in self._rows():
                if isinstance(row, BadImage):
                    bad.append(row)
                    continue
                example = row
                rows.append(row)
                if len(rows) == self._batch_size:
                    yield _collate(rows, self._batch_size, row, bad)
                    rows, bad = [], []
        except DataError as error:
            yield failed(str(error))
            return
        if rows or bad:
            yield _collate(rows, self._batch_size, example, bad)

    def _rows(self) -> Iterator[Ready | BadImage]:
        """Yield the augmented images. Raises DataError, with the place in the stream, where there is no next one."""
        worker = get_worker_info()
        place = (0 if worker is None else worker.id, self._rank)
        for number, (image, target) in enumerate(_read(self._stream)):
            with preserved():
                seed_generators(derive_seed(SAMPLE, self._seed, self.epoch, *place, number))
                row = _prepared(
                    image,
                    target,
                    self._transform,
                    f"image {number} of the stream (loader process {place[0]})",
                )
            yield row


def _prepared(image: Any, target: Any, transform: Transform, name: str) -> Ready | BadImage:
    """Do the same as `prepared`; a bad image is known by its pixels, because the next pass meets it elsewhere."""
    try:
        return Ready(transform(image), int(target))
    except MemoryError as error:
        raise out_of_memory(name) from error
    except Exception as error:
        known = isinstance(image, Image.Image)
        identity = hashlib.sha256(image.tobytes()).hexdigest() if known else None
        return BadImage(name, cause(error), identity)


def _read(stream: Any) -> Iterator[tuple[Any, Any]]:
    """Read the next sample of the stream. Its errors are of many kinds: of the network, of files, of what a sample
    lacks."""
    count = 0
    try:
        for sample in stream:
            count += 1
            yield sample
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(
            f"the streamed data set cannot be read after {count} images: {reason_of(error)}"
        ) from error


def _collate(rows: list[Ready], size: int, example: Ready | None, bad: list[BadImage]) -> Batch:
    """Return a batch of `size`, padded with `example` where the stream ended; without images if there is no example."""
    if example is None:
        return Batch(None, torch.empty(0), torch.empty(0), bad)
    padded = rows + [example] * (size - len(rows))
    images = torch.stack([each.pixels for each in padded])
    targets = torch.tensor([each.target for each in padded])
    return Batch(images, targets, torch.arange(size) < len(rows), bad)


class StreamFetcher:
    """Passes over a stream, each with fresh loader processes."""

    def __init__(
        self,
        stream: Any,
        config: DataConfig,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        rank: int,
    ) -> None:
        self.bad = BadImages(config.max_bad_images, len(stream))
        if hasattr(stream, "set_loader_cfg"):
            stream.set_loader_cfg(num_workers=config.workers)
        self.stream = stream
        self._config = config
        self._seed = seed
        self._rank = rank
        self._batches = StreamBatches(stream, transform, batch_size, seed, rank)

    def once(self) -> Iterator[Loaded]:
        """Yield the stream from its beginning to its end. Raises DataError where nothing comes."""
        some = False
        for batch in guarded(create_loader(self._batches, self._config)):
            self.bad.add(batch)
            if batch.images is not None:
                some = True
                yield batch.images, batch.targets, batch.valid
        if not some and self.bad.found:
            raise DataError(
                f"no image of the stream can be read; the last is {self.bad.found[-1].describe()}"
            )
        if not some:
            raise DataError(
                f"the streamed data set gave none of its {len(self.stream)} images: each was skipped, as a warning "
                "says, or its shards are empty; data.image_column and data.label_column say where a sample has them"
            )

    def epoch(
        self, epoch: int, start: int, length: int, mixing: Mixup | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches `start` to `length` of an epoch; a stream that ends early begins again."""
        self._batches.epoch = epoch
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)
        for number, (images, targets) in enumerate(itertools.islice(self._full(), length)):
            if number < start:
                continue
            if mixing is not None:
                with preserved():
                    seed = derive_seed(MIXING, self._seed, epoch, number, self._rank)
                    images, targets = mix(mixing, images, targets, seed)
            yield images, targets

    def _full(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            some = False
            for images, targets, valid in self.once():
                if bool(valid.all()):
                    some = True
                    yield images, targets
            if not some:
                raise DataError(
                    "the streamed data set has less than one batch of images for a loader process"
                )


def check_without_index(config: DataConfig, *settings: str) -> None:
    """Raise ConfigError for one of the settings that picks samples by their numbers, which a stream has not."""
    picked = {
        "train_samples": config.train_samples is not None,
        "val_samples": config.val_samples is not None,
        "views": bool(config.views),
        "aug_repeats": epoch_repeats(config) > 1,
    }
    for name in (name for name in settings if picked[name]):
        raise ConfigError(
            f"data.{name}={getattr(config, name)} needs samples by index; {config.dataset} is a stream: leave it out"
        )


def read_all_on_every_rank(stream: Any) -> None:
    """Keep timm from dividing a stream over ranks: its division repeats or drops images."""
    reader = getattr(stream, "reader", None)
    if reader is not None and hasattr(reader, "dist_num_replicas"):
        reader.dist_rank, reader.dist_num_replicas = 0, 1
