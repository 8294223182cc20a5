"""Batches of detection and segmentation: images of their own sizes, each with its objects or its labeled pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import recursively_apply
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from typing_extensions import Unpack

from ...checkpoints.class_names import difference
from ...models.dense import IGNORED
from ...models.errors import ConfigError, DataError
from ..config import DataConfig
from ..mode_config import DenseConfig
from ..setting import setting
from .dense_sets import DenseSource, open_dense
from .loaders import EvalLoader, TrainLoader, val_subset
from .loading import BadImage, Batch, EvalBatches, TrainBatches, attempted
from .sampler import BatchRequest, Indices, Ranks

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
        data = BytesIO()
        torch.save((self.images, self.targets, self.valid), data)
        return _unpacked, (torch.frombuffer(data.getbuffer(), dtype=torch.uint8),)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> DenseBatch:
        return DenseBatch(*recursively_apply(function, (self.images, self.targets, self.valid)))


def _unpacked(data: Tensor) -> DenseBatch:
    return DenseBatch(*torch.load(BytesIO(data.numpy().data), weights_only=True))


# From an item of a data set to tensors.


class DenseAugment(DenseConfig):
    """How images are resized and augmented, by default as in the common recipe of detection on COCO.

    An image is resized to the box of `short` and `long` sides: as large as it fits, its ratio kept.
    """

    hflip: float = setting(0.5, "probability of a horizontal flip")
    crop_sides: tuple[int, int] = setting(
        (384, 600), "range of the height and of the width of an image that is `cropped` before it is resized"
    )
    largest_share: float = setting(
        0.75,
        "share of the labeled pixels of a square crop that one class may have, unless ten crops have more",
    )

    @classmethod
    def to_evaluate(cls, sides: tuple[int, int], given: DenseConfig | None = None) -> DenseAugment:
        """Return how images are resized to the sides of a model, where `given` does not name others."""
        told = {} if given is None else given.model_dump(include=given.model_fields_set & {"short", "long"})
        return cls(**{"short": [sides[0]], "long": sides[1]} | told)

    def train(self, image: Image.Image, target: Target) -> tuple[Tensor, Target]:
        """Return an image (3, H, W) of 0 to 1 and its target, augmented by draws from torch's generator."""
        item = _as_tensors(image, {key: target[key] for key in target if key not in SCORED})
        if self.cropped and torch.rand(()) < 0.5:
            low, high = self.crop_sides
            item = _resized(item, _one_of(self.cropped), self.long)
            item = _cropped(item, *torch.randint(low, high + 1, (2,)).tolist())
        factor = float(torch.empty(()).uniform_(*self.scale)) if self.scale else 1.0
        item = _resized(item, _one_of(self.short) * factor, self.long * factor)
        if self.crop:
            item = self._crop(item, self.crop)
        item = v2.RandomHorizontalFlip(self.hflip)(item)
        if self.distort:
            item = Distortion()(item)
        if "boxes" in item:
            item = v2.SanitizeBoundingBoxes(min_size=1)(v2.ClampBoundingBoxes()(item))
        return _finished(item)

    def evaluate(self, image: Image.Image, target: Target) -> tuple[Tensor, Target]:
        """Return an image (3, H, W) of 0 to 1, resized; its target stays that of the file."""
        resized = _resized({"image": F.to_image(image)}, max(self.short), self.long)
        return _finished({**resized, **target})

    def _crop(self, item: Target, side: int) -> Target:
        for _ in range(10):
            found = _cropped(item, side, side)
            if "boxes" in item:
                break
            counts = torch.bincount(found["labels"].flatten(), minlength=256)[:IGNORED]
            if counts.max() < self.largest_share * counts.sum():
                break
        return found


class Distortion(v2.RandomPhotometricDistort):
    """Changes an image of bytes as the published code of segmentation does, each of these with probability 1/2.

    Brightness: -32 to 32 are added. Contrast, before or after the rest: times 0.5 to 1.5. Saturation: times 0.5 to 1.5.
    Hue: a tenth of the circle at most.
    """

    def __init__(self) -> None:
        super().__init__(brightness=(-32, 32), hue=(-0.1, 0.1))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Return an image with these changes; other tensors as they are."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        shift, factor = params["brightness_factor"] or 0.0, params["contrast_factor"]
        first = factor if params["contrast_before"] else None
        added = (inpt.int() + round(shift)).clamp(0, 255).to(inpt.dtype)
        rest = {**params, "brightness_factor": first, "contrast_factor": None, "channel_permutation": None}
        found = super().transform(tv_tensors.wrap(added, like=inpt), rest)  # its brightness is a product
        return found if factor is None or first is not None else F.adjust_brightness(found, factor)


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


def _one_of(sizes: Sequence[int]) -> int:
    return sizes[int(torch.randint(len(sizes), ()))]


def _resized(item: Target, short: float, long: float) -> Target:
    height, width = item["image"].shape[-2:]
    ratio = min(short / min(height, width), long / max(height, width))
    return v2.Resize([max(1, round(height * ratio)), max(1, round(width * ratio))])(item)


def _cropped(item: Target, height: int, width: int) -> Target:
    """Return a random part of at most this size."""
    rows, columns = item["image"].shape[-2:]
    return v2.RandomCrop((min(height, rows), min(width, columns)))(item)


def _finished(item: Target) -> tuple[Tensor, Target]:
    """Return the image as float32 from 0 to 1, and the target as plain tensors."""
    image = F.to_dtype(item["image"], torch.float32, scale=True)
    plain = v2.ToPureTensor()({**item, "image": image, "labels": item["labels"].long()})
    return plain.pop("image"), plain


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
    groups.sort(key=lambda group: (len(group) < size, group[-1]))
    return np.asarray(order[np.concatenate(groups)])


def _augmented(source: DenseSource, place: int, augment: Any) -> tuple[Tensor, Target] | BadImage:
    """Return an item as `augment` makes it, or why it cannot be."""
    return attempted(source, place, lambda: augment(*source.read(place)))


def _joined(rows: Sequence[tuple[Tensor, Target]], valid: Tensor, bad: list[BadImage]) -> Batch:
    images, targets = zip(*rows, strict=True)
    return Batch(DenseBatch(list(images), list(targets), valid), torch.empty(0), valid, bad)


class DenseTrainBatches(TrainBatches):
    """BatchRequest -> Batch whose images are a `DenseBatch`. A bad image is replaced by the next readable one."""

    _source: Any

    def _prepared(self, place: int) -> Any:
        return _augmented(self._source, place, self._transform)

    def _joined(self, ready: Sequence[Any], request: BatchRequest, view: int, bad: list[BadImage]) -> Batch:
        return _joined(ready, torch.ones(len(ready), dtype=torch.bool), bad)


class DenseEvalBatches(EvalBatches):
    """BatchRequest -> Batch whose images are a `DenseBatch`; a black image, not valid, for padding and bad images."""

    _source: Any

    def _make(self, request: BatchRequest) -> Batch:
        wanted = request.indices[: request.valid]
        found = [_augmented(self._source, index, self._transform) for index in wanted]
        good = [None if isinstance(each, BadImage) else each for each in found]
        good += [None] * (len(request.indices) - len(good))
        valid = torch.tensor([row is not None for row in good])
        bad = [each for each in found if isinstance(each, BadImage)]
        return _joined([row or self._padding() for row in good], valid, bad)

    def _padding(self) -> tuple[Tensor, Target]:
        target: Target = {"image_id": -1, "original_size": self._size[1:]}
        if self._source.task == "segmentation":
            target["labels"] = torch.full(self._size[1:], IGNORED)
        else:
            target |= {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
        return torch.zeros(self._size), target


class DenseTrainLoader(TrainLoader):
    """Augmented training batches of this rank, each of images of one orientation where that is known.

    As `TrainLoader`, but an epoch yields `(DenseBatch,)`, which is what a task takes.
    """

    def _create_batches(self, source: Any, subset: Indices, spec: Any, **how: int) -> TrainBatches:
        self._wide = None if source.wide is None else source.wide[subset]
        return DenseTrainBatches(source, subset, spec.train, mixing=None, **how)

    def epoch_from(self, epoch: int, position: int) -> Iterator[Any]:
        """Return the batches of this rank from a global number of samples on."""
        return ((batch.images,) for batch in self._batches_from(epoch, position))

    def _order(self, epoch: int) -> Indices:
        return grouped_order(super()._order(epoch)[:], self._wide, self.batch_size)


class DenseEvalLoader(EvalLoader):
    """Evaluation batches of this rank, as many on every rank; what is not valid in them only fills them up.

    As `EvalLoader`, but it yields a `DenseBatch`.
    """

    def _create_batches(self, source: Any, spec: Any, accepted: Tensor | None) -> EvalBatches:
        self.source, side = source, max(spec.short)
        return DenseEvalBatches(source, spec.evaluate, (3, side, side), accepted)

    def _read(self) -> Iterator[Any]:
        return (batch.images for batch in self._fetcher.fetch_batches(self._requests()))


def create_dense_train_loader(
    config: DataConfig, augment: DenseAugment, *, masks: bool = False, seed: int, **ranks: Unpack[Ranks]
) -> DenseTrainLoader:
    """Return the training loader of `config.train_split`; objects have masks if asked for. Raises DataError."""
    source = open_dense(config, config.train_split, training=True, masks=masks)
    return DenseTrainLoader(source, config, augment, seed=seed, labels=False, **ranks)  # type: ignore[arg-type]


def create_dense_eval_loader(
    config: DataConfig, augment: DenseAugment, *, masks: bool = False, names: Sequence[str] | None = None,
    **ranks: Unpack[Ranks],
) -> DenseEvalLoader:  # fmt: skip
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
    chosen = val_subset(config, source)  # type: ignore[arg-type]
    return DenseEvalLoader(source, config, augment, labels=False, chosen=chosen, **ranks)  # type: ignore[arg-type]
