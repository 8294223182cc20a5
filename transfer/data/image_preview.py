"""A picture of training images as the model sees them: after augmentation and mixing, in colors for the eye."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from ...checkpoints.preprocessing import Preprocessing
from ...models.errors import DataError
from ..config import DataConfig
from .augment import create_mixing, epoch_repeats, mix, train_transform
from .class_counts import stream_classes
from .datasets import open_dataset
from .fetch import BadImages
from .images import ImageSource
from .loading import Batch, TrainBatches
from .randomness import preserved
from .sampler import MIXING, BatchRequest, derive_seed, epoch_order
from .streams import StreamBatches

COLUMNS = 8
NOTABLE_SHARE = 0.1
"""Share of a mixed label below which a class is not named: label smoothing gives each a little."""


def preview(config: DataConfig, spec: Preprocessing, count: int, *, seed: int = 0) -> Figure:
    """Return the first images of the first epoch of a run with this seed, `count` or all, each under its label.

    Raises DataError: the set cannot be read, or a transform fails.
    """
    dataset = open_dataset(config, config.train_split, spec.input_size[0], training=True, seed=seed)
    if isinstance(dataset, IterableDataset):
        names: Sequence[str] = stream_classes(dataset) or ()
        batch = _of_stream(dataset, config, spec, count, seed, config.num_classes or len(names))
    else:
        names = dataset.class_names or ()
        batch = _of_source(dataset, config, spec, count, seed)
    if batch.failure is not None or batch.images is None:
        last = f"; the last tried is {batch.bad[-1].describe()}" if batch.bad else ""
        raise DataError(batch.failure or f"no image of split {config.train_split!r} can be read{last}")
    captions = [_caption(target, names) for target in batch.targets[batch.valid]]
    return _draw(for_the_eye(batch.images[batch.valid], spec), captions)


def for_the_eye(images_BCHW: Tensor, spec: Preprocessing) -> NDArray[np.float32]:
    """Return images (B, H, W, 3) of values from 0 to 1, from those that the model sees."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    seen = (images_BCHW * std + mean).clamp(0, 1).expand(-1, 3, -1, -1)
    array: NDArray[np.float32] = seen.permute(0, 2, 3, 1).numpy()
    return array


def _of_source(source: ImageSource, config: DataConfig, spec: Preprocessing, count: int, seed: int) -> Batch:
    largest = max(source.targets or (), default=0)
    classes = config.num_classes or max(1, len(source.class_names or ()), largest + 1)
    batches = TrainBatches(
        source,
        np.arange(len(source), dtype=np.int64),
        train_transform(config, spec),
        seed=seed,
        mixing=create_mixing(config, classes),
        tries=BadImages(config.max_bad_images, len(source)).limit + 1,
        repeats=epoch_repeats(config),
    )
    first = epoch_order(len(source), seed, 0, epoch_repeats(config))[:count].tolist()
    return batches[BatchRequest(0, 0, tuple(first), len(first))]


def _of_stream(
    stream: Any, config: DataConfig, spec: Preprocessing, count: int, seed: int, classes: int
) -> Batch:
    batch = next(iter(StreamBatches(stream, train_transform(config, spec), count, seed, 0)), None)
    if batch is None:
        raise DataError(f"{config.dataset} gave no image")
    mixing = create_mixing(config, classes) if classes else None
    if mixing is None or batch.images is None:
        return batch
    with preserved():
        images, targets = mix(mixing, batch.images, batch.targets, derive_seed(MIXING, seed, 0, 0, 0))
    return batch._replace(images=images, targets=targets)


def _caption(target: Tensor, names: Sequence[str]) -> str:
    """Return the class, or what it is mixed of."""
    if target.ndim == 0:
        return _name(int(target), names)
    shares = sorted(((float(share), label) for label, share in enumerate(target)), reverse=True)
    shown = [(share, label) for share, label in shares if share >= NOTABLE_SHARE][:2] or shares[:1]
    if len(shown) == 1:
        return _name(shown[0][1], names)
    return "\n".join(f"{share:.0%} {_name(label, names)}" for share, label in shown)


def _name(label: int, names: Sequence[str]) -> str:
    if label < 0:
        return ""
    word = names[label] if label < len(names) else str(label)
    return word if len(word) <= 16 else f"{word[:15]}…"


def _draw(pictures: NDArray[np.float32], captions: Sequence[str]) -> Figure:
    columns = min(COLUMNS, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.85 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, picture, caption in itertools.zip_longest(axes, pictures, captions):
        axis.set_axis_off()
        if picture is not None:
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(caption, fontsize=8)
    return figure
