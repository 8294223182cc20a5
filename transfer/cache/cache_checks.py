"""What a run with `transfer.cache` must be, before anything is read."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from ...checkpoints.files import nearest_folder
from ...models.errors import ConfigError
from ..config import RunConfig
from ..methods.method import TransferMethod

MARGIN = 0.9
"""The part of the free disk that targets may take by default."""


def check_cache(config: RunConfig, methods: Sequence[TransferMethod]) -> None:
    """Raise ConfigError for settings with which a teacher's targets cannot be kept."""
    data, transfer = config.data, config.transfer
    if transfer.cache is None:
        return
    if not transfer.cache.strip() or (Path(transfer.cache).exists() and not Path(transfer.cache).is_dir()):
        raise ConfigError(
            f"transfer.cache={transfer.cache!r} is not a folder: name one, which is made if needed"
        )
    for method, settings in zip(methods, transfer.terms, strict=True):
        if not method.keeps_vectors(settings):
            raise ConfigError(
                f"transfer.cache={transfer.cache} does not go with transfer.method={method.name}, which takes maps or "
                "tokens of its teacher: use logits or feature with tokens=pooled, or leave transfer.cache out"
            )
    if transfer.share_drop_path:
        raise ConfigError(
            "transfer.cache does not go with transfer.share_drop_path=true, with which a teacher computes something "
            "else in each step: set one of them to false or none"
        )
    if data.views is None:
        raise ConfigError(
            "transfer.cache keeps targets of a fixed number of views of each image: set data.views to a number, or to "
            "0 for no augmentation"
        )
    for name in ("mixup", "cutmix"):
        if getattr(data, name) > 0:
            raise ConfigError(
                f"transfer.cache does not go with data.{name}={getattr(data, name):g}, which mixes other "
                "images in each epoch: set it to 0"
            )


def check_metric(kind: str) -> None:
    """Raise ConfigError for a metric that needs the teacher on the test images."""
    if kind in ("distance", "objective"):
        raise ConfigError(
            "transfer.cache keeps targets of the training images alone, and this run's metric needs the teachers on "
            "the test images: set engine.metric to top1, knn or probe, or data.val_split to none"
        )


def check_size(folder: str, limit: float | None, whole: int, missing: int, *, here: bool) -> None:
    """Raise ConfigError where the targets of a run, `whole` bytes of which some are `missing`, are too large.

    `here`: the run would be on this machine, whose disk is known.
    """
    if limit is not None:
        if whole > limit * 2**30:
            raise ConfigError(
                f"transfer.cache={folder} would hold {gibibytes(whole)} for this run, more than "
                f"transfer.cache_limit={limit:g} GiB: raise it, or lower data.views"
            )
        return
    free = shutil.disk_usage(nearest_folder(Path(folder))).free
    if here and missing > MARGIN * free:
        raise ConfigError(
            f"transfer.cache={folder} lacks {gibibytes(missing)}, more than 90% of the {gibibytes(free)} that are free "
            "there: make room, name another folder, lower data.views, or set transfer.cache_limit"
        )


def gibibytes(size: float) -> str:
    """Return a size in GiB, in MiB where it is small."""
    if size < 2**28:
        return f"{math.ceil(size / 2**20 * 10) / 10:.1f} MiB"
    return f"{size / 2**30:.2f} GiB"
