"""A few training images as they are, drawn over the whole set: what a conversion is calibrated on."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checkpoints.preprocessing import Preprocessing
from ...models.errors import DataError
from ..config import DataConfig
from .loaders import create_train_loader
from .randomness import preserved

PLAIN = {
    "aa": None,
    "color_jitter": 0.0,
    "hflip": 0.0,
    "reprob": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "views": None,
    "aug_repeats": 1,
}


def sample_images(config: DataConfig, spec: Preprocessing, count: int, *, seed: int = 0) -> Tensor:
    """`count` images (count, C, H, W) of `config.train_split`, or all if it has fewer; cropped by little, not flipped.

    Raises DataError: the set cannot be read, or is empty. ConfigError: it is not known.
    """
    plain = config.model_copy(update={**PLAIN, "crop_scale": (0.8, 1.0), "batch_size": count, "workers": 0})
    with preserved():
        loader = create_train_loader(plain, spec, seed=seed, labels=False)
        batch = next(iter(loader.epoch(0)), None)
    if batch is None:
        name = config.dataset or config.data_path
        raise DataError(f"{name} has no images in {config.train_split!r}")
    return torch.as_tensor(batch[0])
