"""The statistics of the teachers' features, measured before the first step of a new run."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...models.converted import is_mark
from ..cache.target_rows import TargetRows
from ..config import RunConfig
from ..data.loaders import create_train_loader
from ..data.randomness import preserved
from ..methods.standardize import Batch, Standardizer
from . import deadline
from .build import Parts

logger = logging.getLogger(__name__)


def measure_features(config: RunConfig, parts: Parts, accelerator: Accelerator) -> None:
    """Fill the standardizers of a new run from its first training images; the random generators stay as they were.

    Every process sees the same images, those of a run of one process, and then takes the first one's numbers: devices
    of two kinds round differently.
    """
    statistics = _statistics(parts.task)
    if not statistics:
        return
    with preserved(), accelerator.autocast():
        parts.task.measure(_first_images(config, parts, accelerator))
    if accelerator.num_processes > 1:
        for _, tensor in statistics:
            dist.broadcast(tensor, 0)
    logger.info("the statistics of the teachers' features are measured on training images")


def leave_to_us(task: nn.Module) -> None:
    """Tell DDP not to send the statistics and the marks of operators again in each step: they never change."""
    names = [name for name, _ in _statistics(task)]
    names += [name for name, _ in task.named_buffers() if is_mark(name)]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, names)


def _statistics(task: nn.Module) -> list[tuple[str, Tensor]]:
    found = [(name, each) for name, each in task.named_modules() if isinstance(each, Standardizer)]
    return [(f"{prefix}.{name}", tensor) for prefix, each in found for name, tensor in each.named_buffers()]


def _first_images(config: RunConfig, parts: Parts, accelerator: Accelerator) -> Iterator[Batch]:
    """Yield the batches that a run of one process would begin with, without mixing."""
    data = config.data.model_copy(update={"mixup": 0.0, "cutmix": 0.0})
    loader = create_train_loader(data, parts.spec, seed=config.seed, labels=False)
    if parts.targets is None:
        for images, _ in loader.epoch(0):
            deadline.moved()
            yield images.to(accelerator.device)
        return
    loader.batches.beside = TargetRows(parts.targets)
    for images, _, taught in loader.full_epoch(0):
        deadline.moved()
        yield images.to(accelerator.device), send_to_device(taught, accelerator.device)
