"""Batches of detection and segmentation: images of their own sizes, each with its objects or its labeled pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ...checkpoints.class_names import difference
from ...models.errors import ConfigError, DataError
from ..config import DataConfig
from .dense_sets import IGNORED, DenseSource, open_dense
from .loaders import EvalLoader, TrainLoader
from .loading import BadImage, BadImages, Batch, Fetcher, TrainBatches, attempted, made, name_of
from .sampler import BatchRequest, Indices, derive_seed

Target = dict[str, Any]
SCORED = ("area", "iscrowd")
"""What only scores ask for."""


@dataclass
class DenseBatch:
    """B images (3, H_i, W_i) of 0 to 1, their targets, and which of them count (B,).

    A target of detection has `boxes` (N, 4) x, y, x, y and `labels` (N,), and `masks` (N, H_i, W_i) if they are asked
    for; that of segmentation has `labels` (H_i, W_i), 255 where a pixel is ignored. Both have `image_id` and
    `original_size` (height, width). In training they fit the image; in evaluation the file, with `area` (N,) and
    `iscrowd` (N,).
    """

    images: list[Tensor]
    targets: list[Target]
    valid: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DenseBatch:
        """Return the batch on a device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> DenseBatch:
        """Return the batch in memory that a device copies from at once."""
        return self._mapped(Tensor.pin_memory)

    def only(self, rows: Sequence[int]) -> DenseBatch:
        """Return some of its images."""
        images, targets = [self.images[row] for row in rows], [self.targets[row] for row in rows]
        return DenseBatch(images, targets, self.valid[list(rows)])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pass between processes as one tensor: each takes a file descriptor, of which a process has few."""
        parts: list[Tensor] = []

        def pack(tensor: Tensor) -> _Packed:
            data = torch.tensor([], dtype=torch.uint8)
            if tensor.numel():
                data = tensor.contiguous().flatten().view(torch.uint8)
            place = _Packed(sum(map(len, parts)), tensor.dtype, tensor.shape)
            parts.append(torch.nn.functional.pad(data, (0, -len(data) % 8)))
            return place

        packed = self._mapped(pack)
        return _unpacked, (torch.cat(parts), packed.images, packed.targets, packed.valid)

    def _mapped(self, function: Callable[[Any], Any], kind: type = Tensor) -> DenseBatch:
        targets = [
            {key: function(value) if isinstance(value, kind) else value for key, value in target.items()}
            for target in self.targets
        ]
        return DenseBatch([function(image) for image in self.images], targets, function(self.valid))


@dataclass(frozen=True)
class _Packed:
    """A place in a tensor of bytes."""

    start: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, data: Tensor) -> Tensor:
        end = self.start + self.shape.numel() * self.dtype.itemsize
        return data[self.start : end].view(self.dtype).view(self.shape)


def _unpacked(data: Tensor, *fields: Any) -> DenseBatch:
    return DenseBatch(*fields)._mapped(lambda place: place.of(data), _Packed)


# From an item of a data set to tensors.


@dataclass(frozen=True)
class DenseAugment:
    """How images are resized and augmented.

    An image is resized to the box of `short` and `long` sides: as large as it fits, its ratio kept. The defaults are
    the common recipe of detection on COCO.
    """

    short: tuple[int, ...] = (800,)
    """Sizes that the shorter side is drawn from; evaluation takes the largest."""
    long: int = 1333
    """Largest size of the longer side."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    cropped: tuple[int, ...] = ()
    """If given, half of the images are first resized to one of these shorter sides, and cropped: (400, 500, 600) in the
    longer recipe of Swin (arXiv:2103.14030)."""
    crop_sides: tuple[int, int] = (384, 600)
    """Range of the height and of the width of that crop."""
    scale: tuple[float, float] | None = None
    """If given, the box is multiplied by a factor from this range: (0.1, 2) in large-scale jitter (arXiv:2012.07177),
    (0.5, 2) in segmentation."""
    crop: int | None = None
    """If given, a square of at most this side is cropped at last."""
    largest_share: float = 0.75
    """Share of the labeled pixels of a crop that one class may have in segmentation, unless ten crops have more."""
    distort: bool = False
    """Whether brightness, contrast, saturation and hue change at random."""

    def train(self, image: Image.Image, target: Target) -> tuple[Tensor, Target]:
        """Return an image (3, H, W) of 0 to 1 and its target, augmented by draws from torch's generator."""
        item = _as_tensors(image, {key: target[key] for key in target if key not in SCORED})
        if self.cropped and _drawn(0, 1) < 0.5:
            item = _resized(item, _one_of(self.cropped), self.long)
            item = _cropped(item, *(_between(*self.crop_sides) for _ in range(2)))
        factor = _drawn(*self.scale) if self.scale else 1.0
        item = _resized(item, _one_of(self.short) * factor, self.long * factor)
        if self.crop:
            item = self._crop(item, self.crop)
        if _drawn(0, 1) < self.hflip:
            item = _mapped(item, F.horizontal_flip)
        if self.distort:
            item["image"] = Distortion()(item["image"])
        return _finished(_sanitized(item))

    def evaluate(self, image: Image.Image, target: Target) -> tuple[Tensor, Target]:
        """Return an image (3, H, W) of 0 to 1, resized; its target stays that of the file."""
        resized = _resized({"image": F.to_image(image)}, max(self.short), self.long)
        return _finished({**resized, **target})

    def _crop(self, item: Target, side: int) -> Target:
        found = _cropped(item, side, side)
        if "boxes" in item:
            return found
        for _ in range(9):
            counts = torch.bincount(found["labels"].flatten(), minlength=256)[:IGNORED]
            if counts.max() < self.largest_share * counts.sum():
                break
            found = _cropped(item, side, side)
        return found


class Distortion(v2.RandomPhotometricDistort):
    """Changes brightness, contrast, saturation and hue, each with probability 1/2, and leaves the channels in order."""

    def __init__(self) -> None:
        super().__init__(hue=(-0.1, 0.1))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


def _as_tensors(image: Image.Image, target: Target) -> Target:
    """Return an item as torchvision's kinds of tensors, which its functions know how to change."""
    item = {**target, "image": F.to_image(image)}
    if "boxes" in item:
        canvas = (image.height, image.width)
        item["boxes"] = tv_tensors.BoundingBoxes(item["boxes"], format="XYXY", canvas_size=canvas)
        if "masks" in item:
            item["masks"] = tv_tensors.Mask(item["masks"])
    else:
        item["labels"] = tv_tensors.Mask(item["labels"])
    return item


def _mapped(item: Target, function: Callable[[Any], Any]) -> Target:
    return {
        key: function(value) if isinstance(value, tv_tensors.TVTensor) else value
        for key, value in item.items()
    }


def _resized(item: Target, short: float, long: float) -> Target:
    height, width = item["image"].shape[-2:]
    ratio = min(short / min(height, width), long / max(height, width))
    size = [max(1, round(height * ratio)), max(1, round(width * ratio))]
    return item if size == [height, width] else _mapped(item, partial(F.resize, size=size, antialias=True))


def _cropped(item: Target, height: int, width: int) -> Target:
    """Return a random part of at most this size."""
    rows, columns = item["image"].shape[-2:]
    height, width = min(height, rows), min(width, columns)
    top, left = _between(0, rows - height), _between(0, columns - width)
    return _mapped(item, partial(F.crop, top=top, left=left, height=height, width=width))


def _sanitized(item: Target) -> Target:
    """Return an item without the boxes that are now below a pixel."""
    if "boxes" not in item:
        return item
    boxes = F.clamp_bounding_boxes(item["boxes"])
    kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1).as_subclass(Tensor)
    cut = {**item, "boxes": boxes}
    return cut | {key: cut[key][kept] for key in ("boxes", "labels", "masks") if key in cut}


def _finished(item: Target) -> tuple[Tensor, Target]:
    """Return the image as float32 from 0 to 1, and the target as plain tensors."""
    image = F.to_dtype(item.pop("image"), torch.float32, scale=True)
    plain = {
        key: value.as_subclass(Tensor) if isinstance(value, Tensor) else value for key, value in item.items()
    }
    plain["labels"] = plain["labels"].long()
    return image.as_subclass(Tensor), plain


def _drawn(low: float, high: float) -> float:
    return low + float(torch.rand(())) * (high - low)


def _between(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def _one_of(sizes: Sequence[int]) -> int:
    return sizes[_between(0, len(sizes) - 1)]


# Loaders.


def grouped_order(order: Indices, wide: npt.NDArray[np.bool_] | None, size: int) -> Indices:
    """Return the order with groups of `size` images of one orientation: a permutation of it.

    A group stands where its last image stood. What fills no group comes last. `wide` says of each image whether it is
    at least as wide as tall. The groups do not depend on the number of processes.
    """
    if wide is None:
        return order
    places = [np.flatnonzero(wide[order] == kind) for kind in (False, True)]
    groups = [kind[start : start + size] for kind in places for start in range(0, len(kind), size)]
    full = sorted((group for group in groups if len(group) == size), key=lambda group: int(group[-1]))
    rest = np.sort(np.concatenate([np.empty(0, np.int64), *(group for group in groups if len(group) < size)]))
    return np.asarray(order[np.concatenate([*full, rest])])


class DenseTrainBatches(TrainBatches):
    """BatchRequest -> Batch whose images are a `DenseBatch`. A bad image is replaced by the next readable one."""

    def __init__(
        self, source: DenseSource, subset: Indices, augment: DenseAugment, *, seed: int, tries: int
    ) -> None:
        self._source: Any = source
        self._subset, self._seed, self._mixing, self._views, self._repeats = subset, seed, None, None, 1
        self._tries, self._augment = min(tries, len(subset)), augment

    def _prepared(self, place: int) -> Any:
        return attempted(self._source, place, lambda: self._augment.train(*self._source.read(place)))

    def _joined(self, ready: Sequence[Any], request: BatchRequest, view: int, bad: list[BadImage]) -> Batch:
        images, targets = zip(*ready, strict=True)
        valid = torch.ones(len(ready), dtype=torch.bool)
        return Batch(DenseBatch(list(images), list(targets), valid), torch.empty(0), valid, bad)


class DenseEvalBatches(Dataset[Batch]):
    """BatchRequest -> Batch whose images are a `DenseBatch`; a black image, not valid, for padding and bad images."""

    def __init__(self, source: DenseSource, augment: DenseAugment) -> None:
        self._source, self._augment = source, augment

    def __getitem__(self, request: BatchRequest) -> Batch:
        return made(self._make, request, partial(name_of, self._source))

    def _make(self, request: BatchRequest) -> Batch:
        found = [self._prepared(index) for index in request.indices[: request.valid]]
        bad = [each for each in found if isinstance(each, BadImage)]
        good = [None if isinstance(each, BadImage) else each for each in found]
        rows = good + [None] * (len(request.indices) - len(good))
        valid = torch.tensor([row is not None for row in rows])
        images, targets = zip(*(row or self._padding() for row in rows), strict=True)
        return Batch(DenseBatch(list(images), list(targets), valid), torch.empty(0), valid, bad)

    def _prepared(self, index: int) -> tuple[Tensor, Target] | BadImage:
        return attempted(self._source, index, lambda: self._augment.evaluate(*self._source.read(index)))

    def _padding(self) -> tuple[Tensor, Target]:
        side = max(self._augment.short)
        target: Target = {"image_id": -1, "original_size": (side, side)}
        if self._source.task == "segmentation":
            target["labels"] = torch.full((side, side), IGNORED)
        else:
            target |= {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
        return torch.zeros(3, side, side), target


class DenseTrainLoader(TrainLoader):
    """Augmented training batches of this rank, each of images of one orientation where that is known.

    As `TrainLoader`, but an epoch yields `(DenseBatch,)`, which is what a task takes.
    """

    def __init__(
        self,
        source: DenseSource,
        config: DataConfig,
        augment: DenseAugment,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        subset = _subset(config, len(source))
        self.class_names, self.num_classes = source.class_names, len(source.class_names)
        self._divide(config, len(subset), seed, rank, world_size)
        self._wide = None if source.wide is None else source.wide[subset]
        bad = BadImages(config.max_bad_images, self.num_samples)
        self.batches = DenseTrainBatches(source, subset, augment, seed=seed, tries=bad.limit + 1)
        self._fetcher = Fetcher(self.batches, config, bad)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[DenseBatch]]:  # type: ignore[override]
        """Return the batches of this rank from batch `start` on."""
        return self.epoch_from(epoch, start * self.batch_size * self._world_size)

    def epoch_from(self, epoch: int, position: int) -> Iterator[tuple[DenseBatch]]:  # type: ignore[override]
        """Do the same as `epoch`, from a global number of samples: how a run resumes on another number of ranks."""
        for batch in self._batches_from(epoch, position):
            if batch.images is not None:
                yield (batch.images,)

    def _order(self, epoch: int) -> Indices:
        return grouped_order(super()._order(epoch), self._wide, self.batch_size)


class DenseEvalLoader(EvalLoader):
    """Evaluation batches of this rank, as many on every rank; what is not valid in them only fills them up.

    As `EvalLoader`, but it yields a `DenseBatch`.
    """

    def __init__(
        self,
        source: DenseSource,
        config: DataConfig,
        augment: DenseAugment,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.class_names, self.num_classes = source.class_names, len(source.class_names)
        self.num_samples = len(source)
        self._batch_size = config.eval_batch_size or config.batch_size
        self._rank, self._world_size = rank, world_size
        bad = BadImages(config.max_bad_images, self.num_samples)
        self._fetcher = Fetcher(DenseEvalBatches(source, augment), config, bad)

    def _read(self) -> Iterator[Any]:
        for batch in self._fetcher.fetch_batches(self._requests()):
            yield batch.images


def create_dense_train_loader(
    config: DataConfig,
    augment: DenseAugment,
    *,
    masks: bool = False,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> DenseTrainLoader:
    """Return the training loader of `config.train_split`; objects have masks if asked for. Raises DataError."""
    source = open_dense(config, config.train_split, training=True, masks=masks)
    return DenseTrainLoader(source, config, augment, seed=seed, rank=rank, world_size=world_size)


def create_dense_eval_loader(
    config: DataConfig,
    augment: DenseAugment,
    *,
    masks: bool = False,
    rank: int = 0,
    world_size: int = 1,
    names: Sequence[str] | None = None,
) -> DenseEvalLoader:
    """Return the loader of `config.val_split`.

    Raises DataError, also where the classes are not `names`, in their order; ConfigError without such a split.
    """
    if config.val_split is None:
        raise ConfigError("data.val_split=none, and this needs images to evaluate on: name a split")
    source = open_dense(config, config.val_split, training=False, masks=masks)
    if names is not None and list(names) != list(source.class_names):
        raise DataError(
            f"split {config.val_split!r} of {config.data_path} has {difference(source.class_names, names)} of the model"
        )
    return DenseEvalLoader(source, config, augment, rank=rank, world_size=world_size)


def _subset(config: DataConfig, size: int) -> Indices:
    """Return the images to train on: all, or `data.train_samples` drawn by `data.label_seed`."""
    count = size if config.train_samples is None else config.train_samples
    if count > size:
        raise ConfigError(
            f"data.train_samples={count} is more than the {size} images of {config.train_split!r}"
        )
    drawn = np.random.RandomState(derive_seed(config.label_seed)).permutation(size)[:count]
    return np.sort(drawn).astype(np.int64)
