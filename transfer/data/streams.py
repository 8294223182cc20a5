"""Streamed data sets (wds, hfids, tfds): images that come in an order of their own, not by index.

The order is timm's, seeded by (seed, epoch) and by the number of ranks and loader processes. A resumed epoch
is fast-forwarded: the batches that were seen are read again and discarded, which takes the time of reading
them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm.data.mixup import Mixup
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ...models.errors import DataError
from ..engine.randomness import preserved
from .augment import Transform, mix, seed_generators
from .fetch import create_loader, guarded
from .loading import Batch, failed, transformed
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
        rows: list[tuple[Tensor, int]] = []
        try:
            for row in self._rows():
                rows.append(row)
                if len(rows) == self._batch_size:
                    yield _collate(rows, self._batch_size)
                    rows = []
        except DataError as error:
            yield failed(str(error))
            return
        if rows:
            yield _collate(rows, self._batch_size)

    def _rows(self) -> Iterator[tuple[Tensor, int]]:
        """The augmented images. Raises DataError, with the place in the stream, where there is no next one."""
        worker = get_worker_info()
        place = (0 if worker is None else worker.id, self._rank)
        for number, (image, target) in enumerate(_read(self._stream)):
            with preserved():
                seed_generators(derive_seed(SAMPLE, self._seed, self.epoch, *place, number))
                name = partial("image {} of the stream (loader process {})".format, number, place[0])
                pixels = transformed(self._transform, image, name)
            yield pixels, int(target)


def _read(stream: Any) -> Iterator[tuple[Any, Any]]:
    """What the stream gives. Its errors are of many kinds: of the network, of files, of what a sample lacks."""
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


def _collate(rows: list[tuple[Tensor, int]], size: int) -> Batch:
    """A batch of `size`, padded with its first image where the stream ended."""
    padded = rows + rows[:1] * (size - len(rows))
    images = torch.stack([image for image, _ in padded])
    return Batch(images, torch.tensor([target for _, target in padded]), torch.arange(size) < len(rows), [])


class StreamFetcher:
    """Passes over a stream, each with fresh loader processes."""

    def __init__(
        self, stream: Any, transform: Transform, *, batch_size: int, workers: int, seed: int, rank: int
    ) -> None:
        if hasattr(stream, "set_loader_cfg"):
            stream.set_loader_cfg(num_workers=workers)
        self.stream = stream
        self._workers = workers
        self._seed = seed
        self._rank = rank
        self._batches = StreamBatches(stream, transform, batch_size, seed, rank)

    def once(self) -> Iterator[Batch]:
        """The stream from its beginning to its end. Raises DataError where nothing comes."""
        some = False
        for batch in guarded(create_loader(self._batches, self._workers)):
            some = True
            yield batch
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
        for number, batch in enumerate(itertools.islice(self._full(), length)):
            if number < start or batch.images is None:
                continue
            images, targets = batch.images, batch.targets
            if mixing is not None:
                with preserved():
                    seed = derive_seed(MIXING, self._seed, epoch, number, self._rank)
                    images, targets = mix(mixing, images, targets, seed)
            yield images, targets

    def _full(self) -> Iterator[Batch]:
        while True:
            some = False
            for batch in self.once():
                if bool(batch.valid.all()):
                    some = True
                    yield batch
            if not some:
                raise DataError(
                    "the streamed data set has less than one batch of images for a loader process"
                )


def read_all_on_every_rank(stream: Any) -> None:
    """Keeps timm from dividing a stream over ranks: its division repeats or drops images."""
    reader = getattr(stream, "reader", None)
    if reader is not None and hasattr(reader, "dist_num_replicas"):
        reader.dist_rank, reader.dist_num_replicas = 0, 1
