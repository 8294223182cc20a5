"""Fit and calibrate the operators of a new student on training images, before its first step."""

from __future__ import annotations

import copy
import logging
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from ...checkpoints.student import FittedLayers
from ...models.attention.base import Projections
from ...models.calibration import Finished, Layer, calibrate_layers, fit_layers
from ...models.conversion import ConvertedAttention, converted_layers
from ...models.families import family_of, sites
from ...models.pyramid_conversion import sharing_copy
from ..config import RunConfig
from ..data.randomness import preserved
from ..data.sample import sample_images
from . import deadline
from .build import Parts
from .modes import mode_of
from .parallel import gather
from .signals import StopSignals
from .teacher_checks import sharded_teachers

logger = logging.getLogger(__name__)


class _StoppedError(Exception):
    """A stop signal came before all layers were fitted."""


@dataclass(frozen=True)
class _UntilSignal:
    """The layers that are fitted already, until a stop signal comes. Every process reads them, the first one writes."""

    layers: FittedLayers
    writes: bool
    signals: StopSignals

    def load(self, index: int, key: str) -> Layer | None:
        deadline.moved()
        if self.signals.received is not None:
            raise _StoppedError
        return self.layers.load(index, key)

    def save(self, index: int, key: str, layer: Layer) -> None:
        if self.writes:
            self.layers.save(index, key, layer)


def fit_operators(
    config: RunConfig,
    parts: Parts,
    accelerator: Accelerator,
    group: dist.ProcessGroup | None,
    signals: StopSignals,
) -> bool:
    """Fit the student's operators before the first step of a run, as `fit_student` does; keep them in `output_dir/fit`.

    Every process fits on the same images, and then takes the first one's numbers: devices of two kinds round
    differently. Return whether all are fitted: a stop signal ends it after a layer that is kept.

    Raises DataError: there are no images. ConfigError: an operator cannot be fitted on so few.
    """
    alone = config.engine.fsdp or sharded_teachers(config)
    device = torch.device("cpu") if alone else accelerator.device
    kept = _UntilSignal(FittedLayers(config.output_dir), accelerator.is_main_process, signals)
    layers: dict[int, ConvertedAttention] | None = None
    with suppress(_StoppedError):
        layers = fit_student(config, parts, device, kept)
    if any(gather(layers is None, group)) or layers is None:
        return False
    for index, layer in layers.items():
        if layer.fit is not None:
            count = config.student.calibrate
            logger.info("fit of layer %d on %d images: %s", index, count, layer.fit)
        if accelerator.num_processes > 1:
            for tensor in layer.operator.state_dict().values():
                _take_first(tensor, accelerator)
    return True


def fit_student(
    config: RunConfig, parts: Parts, device: torch.device, finished: Finished | None
) -> dict[int, ConvertedAttention]:
    """Fit the student's operators on `student.calibrate` images and return their layers; none without images.

    A student that starts from weights sees the inputs of its teacher's layers, if they have the same shapes, and
    `finished` keeps each layer. Else each layer that was never fitted sees what the student itself gives it. The random
    generators stay as they were.
    """
    student = parts.task.trainable
    layers = converted_layers(student) if config.student.calibrate else {}
    if not layers:
        return {}
    starts = mode_of(config).starting_source is not None
    teacher = parts.loaded.model if parts.loaded is not None and starts else None
    student.to(device)
    images = sample_images(config.data, parts.spec, config.student.calibrate, seed=config.seed).to(device)
    if starts:
        for layer in layers.values():
            if not layer.operator.fitted:
                layer.operator.adopt(Projections(layer.original, getattr(layer, "kept", "qkv")))
    with preserved():
        if teacher is not None and _alike(teacher, student):
            taught = sharing_copy(teacher) if device.type == "cpu" else copy.deepcopy(teacher).to(device)
            calibrate_layers(taught, layers, images, seed=config.seed, finished=finished)
        else:
            unfitted = {index: layer for index, layer in layers.items() if not layer.operator.fitted}
            fit_layers(student, unfitted, images, config.seed)
    return layers


def _alike(teacher: nn.Module, student: nn.Module) -> bool:
    """Return whether every layer of the student has one of the same shape in its place in the teacher."""
    if family_of(teacher) is not family_of(student):
        return False
    return [site.shape for site in sites(teacher)] == [site.shape for site in sites(student)]


def _take_first(tensor: torch.Tensor, accelerator: Accelerator) -> None:
    """Set a tensor to the numbers of the first process."""
    there = tensor.detach().to(accelerator.device)
    dist.broadcast(there, 0)
    tensor.data.copy_(there)
