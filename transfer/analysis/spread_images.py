"""Images that stand for a data set: as many as wanted, spread evenly over a split in its own order."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import IterableDataset

from ...checkpoints.preprocessing import Preprocessing
from ...models.errors import ConfigError, DataError
from ..config import DataConfig
from ..data.augment import eval_transform
from ..data.datasets import open_dataset
from ..data.fetch import BadImages, Fetcher
from ..data.images import ImageSource, SourceView
from ..data.loading import EvalBatches
from ..data.sampler import eval_requests


def spread_images(config: DataConfig, channels: int, count: int | None) -> ImageSource:
    """Return `count` images of `config.val_split`; all for None, or where there are no more.

    A folder lists its images by class, so the first ones would be of one class: image k is the middle one of the k-th
    of `count` equal parts.

    Raises DataError as `open_dataset`, and for a stream, whose images cannot be chosen; ConfigError without a split.
    """
    if config.val_split is None:
        raise ConfigError("data.val_split=none, and this needs images: name a split")
    source = open_dataset(config, config.val_split, channels, training=False, by_training=False)
    if isinstance(source, IterableDataset):
        raise DataError(f"images of {config.dataset} come as a stream and cannot be chosen: give a folder")
    size = len(source)
    if count is None or count >= size:
        return source
    chosen = [(2 * part + 1) * size // (2 * count) for part in range(count)]
    return SourceView(source, source.class_names, chosen)


def preprocessed(
    source: ImageSource, config: DataConfig, spec: Preprocessing, batch_size: int
) -> Iterator[Tensor]:
    """Yield batches (B, C, H, W) of the images as the model of `spec` takes them in evaluation.

    Raises DataError: more cannot be read than `max_bad_images` allows.
    """
    batches = EvalBatches(source, eval_transform(spec), spec.input_size, None)
    requests = eval_requests(len(source), batch_size=batch_size, rank=0, world_size=1)
    bad = BadImages(config.max_bad_images, len(source))
    for images, _, valid in Fetcher(batches, config.workers, bad).fetch(requests):
        if valid.any():
            yield images[valid]
