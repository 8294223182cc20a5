"""Fit and calibrate the operators of a new student on training images, before its first step."""

from __future__ import annotations

import copy
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...checkpoints.student import FittedLayers
from ...models.attention.base import Projections
from ...models.calibration import Finished, Layer, calibrate_layers, fit_layers
from ...models.conversion import ConvertedAttention, converted_layers, sharing_copy
from ...models.converted import is_mark
from ...models.errors import GraftError
from ...models.families import family_of, sites
from ..config import DataConfig, RunConfig
from ..data.loaders import create_train_loader
from ..data.sampler import preserved
from ..methods.standardize import Batch, Standardizer
from ..staging import StagingStoppedError, stage
from . import deadline
from .build import Parts
from .modes import goal_of
from .parallel import gather, patient, raise_together, receive
from .signals import StopSignals
from .students import sharded_teachers

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
    if config.student.calibrate and config.starting_source is not None and parts.loaded is not None:
        receive(parts.loaded.model, group)
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
    student = parts.task.backbone
    layers = converted_layers(student) if config.student.calibrate else {}
    if not layers:
        return {}
    starts = config.starting_source is not None
    teacher = parts.loaded.model if parts.loaded is not None and starts else None
    student.to(device)
    images = goal_of(config).sample(config.data, parts.spec, config.student.calibrate, student).to(device)
    if starts:
        for layer in layers.values():
            if not layer.operator.fitted:
                kept = getattr(layer, "kept", "qkv")
                layer.operator.adopt(Projections(layer.original, kept, equal_parts=layer.cuts_rows))
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


# The statistics of the teachers' features, measured before the first step of a new run.


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
    if parts.rows is None:
        for images, _ in loader.epoch(0):
            deadline.moved()
            yield images.to(accelerator.device)
        return
    for images, _, taught in parts.rows.batches(loader, 0):
        deadline.moved()
        there = send_to_device(taught, accelerator.device)
        yield images.to(accelerator.device), parts.rows.form.unpack(there)


# Stage data for all processes of a run: one process per node copies, and the others wait.


def stage_together(
    config: DataConfig, group: dist.ProcessGroup | None, stopped: Callable[[], bool] = lambda: False
) -> DataConfig:
    """Return the settings that read the copy on this process's node; `config` itself without staging.

    All processes of `group` must call it. If one is told to stop, all return, possibly without a copy.
    An error of one process is raised on all.
    """
    if config.stage is None:
        return config
    if group is None:
        staged, error = _try(config, stopped)
        if error is not None:
            raise error
        return staged
    with patient(group) as waiting:
        return _on_each_node(config, waiting, stopped)


def _on_each_node(
    config: DataConfig, group: dist.ProcessGroup | None, stopped: Callable[[], bool]
) -> DataConfig:
    nodes = gather((socket.gethostname(), os.environ.get("SLURMD_NODENAME", "")), group)
    rank = dist.get_rank()
    first = nodes.index(nodes[rank])
    staged, error = _try(config, stopped) if rank == first else (config, None)
    raise_together(error, group)
    return gather(staged, group)[first]


def _try(config: DataConfig, stopped: Callable[[], bool]) -> tuple[DataConfig, GraftError | None]:
    try:
        return stage(config, stopped), None
    except StagingStoppedError:
        return config, None
    except GraftError as error:
        return config, error
