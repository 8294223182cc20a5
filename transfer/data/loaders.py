"""Loaders that hold no state: what they yield is a pure function of (seed, epoch, position)."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ...checkpoints.class_names import KEY as LABEL_NAMES
from ...checkpoints.class_names import Head, read_names
from ...checkpoints.preprocessing import Preprocessing
from ...models.errors import ConfigError, DataError
from ..config import DataConfig
from .augment import Transform, create_mixing, epoch_repeats, eval_transform, train_transform
from .datasets import check_apart, has_split, open_dataset
from .digits import MODEL, number_by_name
from .image_folder import ImageSource
from .kept_views import KeptViews
from .labels import IMAGENET_CLASSES, check_stream, count_classes, real_labels, stream_classes
from .loading import BadImages, Batch, Beside, EvalBatches, Fetcher, Samples, TrainBatches, followed
from .sampler import (
    BatchRequest,
    Indices,
    Order,
    balanced_subset,
    epoch_order,
    eval_requests,
    train_requests,
)
from .shards import ShardImages
from .streams import StreamFetcher, check_without_index, read_all_on_every_rank

__all__ = [
    "AbsentTrainLoader", "EvalLoader", "TrainLoader",
    "create_eval_loader", "create_reference_loader", "create_train_loader", "find_eval_loader",
]  # fmt: skip

logger = logging.getLogger(__name__)

RANGE = 1024
"""Samples without shards whose targets are kept together."""
FullBatch = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Images, targets, and tensors of the same images."""


class TrainLoader:
    """Augmented training batches of this rank.

    `epoch(e, start=k)` yields what `epoch(e)` yields from its batch k on, bit for bit, with any number of
    loader processes, and decodes nothing before it. All ranks have equally many batches: the last incomplete
    global batch is dropped; a set smaller than a global batch is one smaller batch an epoch.
    """

    streamed = False
    """Whether the images come in an order of their own, which depends on the number of ranks."""
    class_names: Sequence[str] | None = None
    repeats = 1
    """Positions of an image in an epoch that shows it (`data.aug_repeats`)."""
    kept: KeptViews | None = None
    """Where its images are kept as bytes (`data.keep_views`)."""

    def __init__(
        self,
        source: ImageSource,
        config: DataConfig,
        spec: Preprocessing,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        labels: bool = True,
    ) -> None:
        self.class_names = source.class_names
        self.num_classes = count_classes(config, source.class_names, source.targets, labels)
        subset = self._choose(source, config, labels)
        self._divide(config, len(subset), seed, rank, world_size)
        self.repeats = epoch_repeats(config)
        labels_of = () if source.targets is None else [source.targets[index] for index in subset]
        self._new_account = partial(
            BadImages, config.max_bad_images, self.num_samples, labels_of, source.class_names
        )
        bad = self._new_account()
        self.batches = self._create_batches(source, subset, spec, seed=seed, tries=bad.limit + 1)
        self._fetcher = Fetcher(self.batches, config, bad)

    def _choose(self, source: Any, config: DataConfig, labels: bool) -> Sequence[int] | Indices:
        return train_subset(config, source, labels)

    def _create_batches(
        self, source: ImageSource, subset: Any, spec: Preprocessing, *, seed: int, tries: int
    ) -> TrainBatches:
        transform = train_transform(self._config, spec)
        batches = TrainBatches(
            source,
            subset,
            transform,
            seed=seed,
            mixing=create_mixing(self._config, self.num_classes),
            tries=tries,
            views=self._config.views,
            repeats=self.repeats,
        )
        if self._config.keep_views is not None:
            self.kept = KeptViews(self._config, spec, seed=seed, samples=self.num_samples)
            batches.keep(self.kept, transform)
        return batches

    def _divide(self, config: DataConfig, samples: int, seed: int, rank: int, world_size: int) -> None:
        """Set what follows from the number of samples. Raises DataError: they are fewer than the ranks."""
        if samples < world_size:
            raise DataError(
                f"split {config.train_split!r} has {samples} images, fewer than {world_size} ranks"
            )
        self.num_samples, self.batch_size = samples, min(config.batch_size, samples // world_size)
        self.batches_per_epoch = samples // (self.batch_size * world_size)
        self._seed, self._rank, self._world_size, self._config = seed, rank, world_size, config

    def head(self) -> Head:
        """Return a head for the classes of these images."""
        return Head(self.num_classes, read_names({LABEL_NAMES: self.class_names}, self.num_classes))

    @property
    def bad_images(self) -> list[str]:
        """Paths of the unreadable images that this rank met."""
        return self._fetcher.bad.paths

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Return images (B, C, H, W) and targets, (B,) long or (B, classes) float if mixed, from batch `start`."""
        return self.epoch_from(epoch, start * self.batch_size * self._world_size)

    def epoch_from(self, epoch: int, position: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Do the same as `epoch`, from a global number of samples: how a run resumes on another number of ranks."""
        for images, targets, _ in self._full_epoch_from(epoch, position):
            yield images, targets

    def full_epoch(self, epoch: int, start: int = 0) -> Iterator[FullBatch]:
        """Do the same as `epoch`, with what `batches.beside` adds."""
        return self._full_epoch_from(epoch, start * self.batch_size * self._world_size)

    def fetch_apart(self, requests: Iterator[BatchRequest], beside: Beside) -> Iterator[Batch]:
        """Yield a batch for each request, with loader processes of its own, and with what `beside` adds."""
        batches = copy.copy(self.batches)
        batches.beside = beside
        yield from Fetcher(batches, self._config, self._new_account()).fetch_batches(requests)

    def sample_ranges(self) -> list[Samples]:
        """Return ranges of samples, in their order, of which targets are kept together."""
        return [
            self._name_range(first, min(RANGE, self.num_samples - first))
            for first in range(0, self.num_samples, RANGE)
        ]

    def _name_range(self, first: int, count: int) -> Samples:
        """Return a range with a digest of the names of its samples, without the folder of the data set."""
        found = hashlib.sha256(self._config.train_split.encode())
        for index in range(first, first + count):
            name = self.batches.name(index).removeprefix(self._prefix)
            found.update(b"\0" + name.encode("utf-8", "surrogatepass"))
        return Samples(found.hexdigest(), count)

    @property
    def _prefix(self) -> str:
        root = self._config.data_path
        return "" if root is None else f"{root.rstrip(os.sep)}{os.sep}"

    def _full_epoch_from(self, epoch: int, position: int) -> Iterator[FullBatch]:
        for batch in self._batches_from(epoch, position):
            if batch.images is not None:
                yield batch.images, batch.targets, batch.beside or {}

    def _batches_from(self, epoch: int, position: int) -> Iterator[Batch]:
        requests = train_requests(
            self._order(epoch),
            epoch,
            batch_size=self.batch_size,
            rank=self._rank,
            world_size=self._world_size,
            start=position,
        )
        return self._fetcher.fetch_batches(requests)

    def _order(self, epoch: int) -> Order:
        return epoch_order(self.num_samples, self._seed, epoch, self.repeats)


class AbsentTrainLoader(TrainLoader):
    """Stands in for a training set that is not on this machine: the classes of the settings, and no image."""

    def __init__(self, config: DataConfig, reason: DataError) -> None:
        self.reason = reason
        self.num_classes = config.num_classes or 0
        self.num_samples, self.batch_size = 0, config.batch_size

    def epoch_from(self, epoch: int, position: int) -> Iterator[tuple[Tensor, Tensor]]:
        raise self.reason


class ShardTrainLoader(TrainLoader):
    """Training batches of shards, whose order is computed for each batch: no list of samples is held."""

    def _choose(self, source: ShardImages, config: DataConfig, labels: bool) -> Sequence[int]:
        if config.train_samples is not None:
            raise ConfigError(
                f"data.train_samples={config.train_samples} needs labels by index; {config.dataset} has them in its "
                "shards: leave it out"
            )
        self._source = source
        return range(len(source))

    def _order(self, epoch: int) -> Order:
        return self._source.order(self._seed, epoch, self.repeats)

    def sample_ranges(self) -> list[Samples]:
        return [Samples(place.removeprefix(self._prefix), count) for place, count in self._source.shards()]


class StreamTrainLoader(TrainLoader):
    """Training batches of a stream (hfids, tfds); see `streams` for what a resumed epoch costs.

    A stream with fewer than `batches_per_epoch` begins again: a run may set what it began with on other ranks.
    """

    streamed = True

    def __init__(
        self,
        stream: Any,
        config: DataConfig,
        spec: Preprocessing,
        *,
        seed: int,
        rank: int,
        world_size: int,
        labels: bool = True,
    ) -> None:
        check_without_index(config, "train_samples", "views", "aug_repeats")
        self.class_names = stream_classes(stream)
        self.num_classes = count_classes(config, self.class_names, None, labels)
        self.batch_size = config.batch_size
        self._stream = StreamFetcher(
            stream,
            config,
            train_transform(config, spec),
            batch_size=config.batch_size,
            seed=seed,
            rank=rank,
        )
        self.num_samples = len(stream) * world_size  # timm counts a rank's share
        self.batches_per_epoch = max(1, self.num_samples // (config.batch_size * world_size))
        self._mixing = create_mixing(config, self.num_classes)

    @property
    def bad_images(self) -> list[str]:
        """Places of the images that no transform takes; those that cannot be decoded timm logs and skips by itself."""
        return self._stream.bad.paths

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Do the same as `TrainLoader`, but the batches before `start` are read and discarded."""
        return self._stream.epoch(epoch, start, self.batches_per_epoch, self._mixing)

    def epoch_from(self, epoch: int, position: int) -> Iterator[tuple[Tensor, Tensor]]:
        raise ConfigError(
            "a streamed data set cannot resume on another number of ranks in the middle of an epoch"
        )


class EvalLoader:
    """Evaluation batches of this rank: (images, targets, valid), as many on every rank, padding not valid.

    Over all ranks each image, or each of the `chosen`, is valid once; unreadable ones, and those without a ReaL label,
    never. Targets are (B,) long, or (B, classes) float, 1 for each accepted class, with ReaL labels. `num_classes` is 0
    for images without labels.
    """

    class_names: Sequence[str] | None = None
    shown = ""
    """What the first process shows the progress of; empty for no progress."""

    def __init__(
        self,
        source: ImageSource,
        config: DataConfig,
        spec: Preprocessing,
        *,
        rank: int = 0,
        world_size: int = 1,
        real: bool = False,
        labels: bool = True,
        transform: Transform | None = None,
        chosen: Sequence[int] | None = None,
    ) -> None:
        accepted = real_labels([source.path(index) for index in range(len(source))]) if real else None
        self._chosen = range(len(source)) if chosen is None else chosen
        self.num_samples = len(self._chosen)
        self.class_names = None if real else source.class_names
        self.num_classes = (
            IMAGENET_CLASSES if real else count_classes(config, source.class_names, source.targets, labels)
        )
        self._batch_size = config.eval_batch_size or config.batch_size
        self._rank, self._world_size = rank, world_size
        self._transform = transform
        self.batches = self._create_batches(source, spec, accepted)
        known = () if source.targets is None else source.targets
        own = (index for request in self._requests() for index in request.indices[: request.valid])
        labels_of = (known[index] for index in own) if known else ()
        bad = BadImages(config.max_bad_images, self.num_samples, labels_of, source.class_names)
        self._fetcher = Fetcher(self.batches, config, bad)

    def _create_batches(
        self, source: ImageSource, spec: Preprocessing, accepted: Tensor | None
    ) -> EvalBatches:
        return EvalBatches(source, self._transform or eval_transform(spec), spec.input_size, accepted)

    def _requests(self) -> Iterator[BatchRequest]:
        return eval_requests(
            self._chosen, batch_size=self._batch_size, rank=self._rank, world_size=self._world_size
        )

    @property
    def bad_images(self) -> list[str]:
        """Paths of the unreadable images that this rank met."""
        return self._fetcher.bad.paths

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if not self.shown or self._rank:
            yield from self._read()
            return
        yield from followed(self._read(), self._count(), self.shown)

    def _count(self) -> int:
        """Return the number of batches of this rank."""
        return math.ceil(self.num_samples / (self._batch_size * self._world_size))

    def _read(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield from self._fetcher.fetch(self._requests())
        bad = self._fetcher.bad.found
        if len(bad) >= self.num_samples:
            raise DataError(
                f"none of the {self.num_samples} images can be read; the first is {bad[0].describe()}"
            )


class StreamEvalLoader(EvalLoader):
    """A stream, read whole by every rank, which counts every `world_size`-th batch: sums are exact."""

    def __init__(
        self,
        stream: Any,
        config: DataConfig,
        spec: Preprocessing,
        *,
        rank: int,
        world_size: int,
        labels: bool = True,
        transform: Transform | None = None,
    ) -> None:
        read_all_on_every_rank(stream)
        self.class_names = stream_classes(stream)
        self.num_classes = count_classes(config, self.class_names, None, labels)
        self._rank, self._world_size = rank, world_size
        self._batch_size = config.eval_batch_size or config.batch_size
        self._stream = StreamFetcher(
            stream,
            config,
            transform or eval_transform(spec),
            batch_size=self._batch_size,
            seed=0,
            rank=0,
        )
        self.num_samples = len(stream)

    @property
    def bad_images(self) -> list[str]:
        """Places of the images that no transform takes; those that cannot be decoded timm logs and skips by itself."""
        return self._stream.bad.paths

    def _count(self) -> int:
        return math.ceil(self.num_samples / self._batch_size)

    def _read(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for number, (images, targets, valid) in enumerate(self._stream.once()):
            mine = number % self._world_size == self._rank
            yield images, targets, valid & mine


@dataclass(frozen=True)
class Views:
    """The same images as several models take them: a batch (B, C, H, W) of each preprocessing."""

    images: tuple[Tensor, ...]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Views:
        return Views(tuple(each.to(device, non_blocking=non_blocking) for each in self.images))


class ViewsLoader(EvalLoader):
    """Loaders of the same images for several preprocessings, side by side: in place of images, `Views` of them.

    An image counts where all can read it.
    """

    def __init__(self, loaders: Sequence[EvalLoader]) -> None:
        first = loaders[0]
        self._loaders, self._rank = loaders, first._rank
        self.num_samples, self.num_classes, self.class_names = (
            first.num_samples,
            first.num_classes,
            first.class_names,
        )

    @property
    def bad_images(self) -> list[str]:
        """Paths of the unreadable images that this rank met."""
        return list(dict.fromkeys(path for each in self._loaders for path in each.bad_images))

    def _count(self) -> int:
        return self._loaders[0]._count()

    def _read(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        for parts in zip(*self._loaders, strict=True):
            images, targets, valid = zip(*parts, strict=True)
            yield Views(images), targets[0], torch.stack(valid).all(0)


def create_train_loader(
    config: DataConfig,
    spec: Preprocessing,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    labels: bool = True,
) -> TrainLoader:
    """Return the training loader of `config.train_split`. Raises DataError or ConfigError, one sentence each.

    Without `labels` the data set may have none: `num_classes` is then 0, and the targets say nothing.
    """
    dataset = open_dataset(config, config.train_split, spec.input_size[0], training=True, seed=seed)
    if isinstance(dataset, IterableDataset):
        return StreamTrainLoader(
            dataset, config, spec, seed=seed, rank=rank, world_size=world_size, labels=labels
        )
    kind = ShardTrainLoader if isinstance(dataset, ShardImages) else TrainLoader
    return kind(dataset, config, spec, seed=seed, rank=rank, world_size=world_size, labels=labels)


def create_eval_loader(
    config: DataConfig,
    spec: Preprocessing,
    *,
    rank: int = 0,
    world_size: int = 1,
    real: bool = False,
    labels: bool = True,
    names: Sequence[str] | None = None,
    transform: Transform | None = None,
) -> EvalLoader:
    """Return the loader of `config.val_split`; `real` scores ImageNet's validation set by its ReaL labels.

    Without `labels` the data set may have none, as for `create_train_loader`. A class has its place in `names` for a
    label, where they are given, and in the training split else. `transform` makes the images in place of timm's.
    """
    if config.val_split is None:
        raise ConfigError("data.val_split=none, and this needs images to evaluate on: name a split")
    dataset = open_dataset(config, config.val_split, spec.input_size[0], training=False, names=names)
    if isinstance(dataset, IterableDataset):
        check_stream(config, dataset, names)
        check_without_index(config, "val_samples")
        if real:
            raise DataError(f"ReaL labels need the images' file names; {config.dataset} is a stream")
        return StreamEvalLoader(
            dataset, config, spec, rank=rank, world_size=world_size, labels=labels, transform=transform
        )
    return EvalLoader(
        dataset,
        config,
        spec,
        rank=rank,
        world_size=world_size,
        real=real,
        labels=labels,
        transform=transform,
        chosen=val_subset(config, dataset),
    )


def find_eval_loader(
    config: DataConfig, spec: Preprocessing, *, rank: int = 0, world_size: int = 1
) -> EvalLoader | None:
    """Do the same as `create_eval_loader` without labels; None where no split is named and the data set has none of
    the usual name.

    Raises DataError: it has not the split that `data.val_split` names.
    """
    named = config.val_split != DataConfig.model_fields["val_split"].default
    try:
        if config.val_split is not None and not has_split(config, config.val_split):
            raise DataError(f"data.val_split={config.val_split} is no folder of {config.data_path}")
        return create_eval_loader(config, spec, rank=rank, world_size=world_size, labels=False)
    except DataError as error:
        if named:
            raise
        logger.warning("nothing is evaluated: %s", error)
        return None


def create_reference_loader(
    config: DataConfig,
    spec: Preprocessing,
    *,
    rank: int = 0,
    world_size: int = 1,
    names: Sequence[str] | None = None,
) -> EvalLoader:
    """Return the labeled images of `config.train_split`, `train_samples` of them, each once and as evaluation sees
    them.

    `names` number the classes as for `create_eval_loader`.

    Raises DataError: they are the images of `config.val_split`, among which each would find itself.
    """
    if config.train_split == config.val_split or not has_split(config, config.train_split):
        raise DataError(
            "knn and probe need labeled training images apart from the test images, and "
            f"{config.data_path or config.dataset} has no folder for split {config.train_split!r} beside "
            f"{config.val_split!r}"
        )
    dataset = open_dataset(config, config.train_split, spec.input_size[0], training=False)
    if isinstance(dataset, IterableDataset):
        check_stream(config, dataset, names)
        return StreamEvalLoader(dataset, config, spec, rank=rank, world_size=world_size)
    check_apart(config, dataset)
    if names is not None:
        dataset = number_by_name(dataset, config.train_split, names, MODEL)
    chosen = None if config.train_samples is None else train_subset(config, dataset).tolist()
    return EvalLoader(dataset, config, spec, rank=rank, world_size=world_size, chosen=chosen)


def train_subset(config: DataConfig, source: ImageSource, labels: bool = True) -> Indices:
    """Return the samples to train on: all, or `data.train_samples` drawn by `data.label_seed`. Raises ConfigError."""
    count = config.train_samples
    if count is None:
        return np.arange(len(source), dtype=np.int64)
    if source.targets is None and labels:
        raise ConfigError(f"data.train_samples needs labels by index; {config.dataset} has none")
    return _subset(source, count, f"data.train_samples={count}", config.train_split, config.label_seed)


def val_subset(config: DataConfig, source: ImageSource) -> list[int] | None:
    """Return the samples to evaluate on, the same in every run, or None for all. Raises ConfigError."""
    count = config.val_samples
    if count is None:
        return None
    return _subset(source, count, f"data.val_samples={count}", config.val_split, seed=0).tolist()


def _subset(source: ImageSource, count: int, setting: str, split: str | None, seed: int) -> Indices:
    """Return `count` samples, balanced over classes where labels are known by index. Raises ConfigError."""
    if count > len(source):
        raise ConfigError(f"{setting} is more than the {len(source)} images of {split!r}")
    return balanced_subset(source.targets or [0] * len(source), count, seed)
