"""Streamed data sets (wds, hfids, tfds): images that come in an order of their own, not by index.

The order is timm's, seeded by (seed, epoch) and by the number of ranks and loader processes. A resumed epoch
is fast-forwarded: the batches that were seen are read again and discarded, which takes the time of reading
them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from timm.data.mixup import Mixup
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ...models.errors import ConfigError, DataError
from ..config import DataConfig
from .augment import Transform, epoch_repeats, mix, seed_generators
from .fetch import BadImages, create_loader, guarded
from .loading import BadImage, Batch, Loaded, Ready, cause, failed, out_of_memory
from .randomness import preserved
from .sampler import MIXING, SAMPLE, derive_seed
from .steps import reason_of


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
        transform: Transform,
        *,
        batch_size: int,
        workers: int,
        seed: int,
        rank: int,
        bad: BadImages,
    ) -> None:
        self.bad = bad
        if hasattr(stream, "set_loader_cfg"):
            stream.set_loader_cfg(num_workers=workers)
        self.stream = stream
        self._workers = workers
        self._seed = seed
        self._rank = rank
        self._batches = StreamBatches(stream, transform, batch_size, seed, rank)

    def once(self) -> Iterator[Loaded]:
        """Yield the stream from its beginning to its end. Raises DataError where nothing comes."""
        some = False
        for batch in guarded(create_loader(self._batches, self._workers)):
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


def check_without_index(config: DataConfig) -> None:
    """Raise ConfigError for a setting that picks samples by their numbers, which a stream has not."""
    picked = {
        "train_samples": config.train_samples is not None,
        "views": bool(config.views),
        "aug_repeats": epoch_repeats(config) > 1,
    }
    for name in (name for name, given in picked.items() if given):
        raise ConfigError(
            f"data.{name}={getattr(config, name)} needs samples by index; {config.dataset} is a stream: leave it out"
        )


def read_all_on_every_rank(stream: Any) -> None:
    """Keep timm from dividing a stream over ranks: its division repeats or drops images."""
    reader = getattr(stream, "reader", None)
    if reader is not None and hasattr(reader, "dist_num_replicas"):
        reader.dist_rank, reader.dist_num_replicas = 0, 1
