"""The first step of a run on tensors that have shapes and no memory: what it would keep, and what it would refuse.

torch's fake tensors run every operation for its shapes alone, in a second or two for a large model, so the sizes are
those of the step itself: of whatever method, operators and frozen parameters the run has.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ...models.errors import ConfigError
from ..config import RunConfig
from .build import Parts
from .ema import WeightAverage
from .optim import create_optimizer
from .tasks import Task, check_learns

CHECKSUM = 8
"""Bytes of the checksum of an image."""
MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Footprint:
    """Bytes of a step on one device, not sharded."""

    student: int
    """All that the task holds: parameters and buffers."""
    teacher: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    """What the forward pass keeps for the backward pass."""


def rehearse(config: RunConfig, parts: Parts, *, here: bool = True) -> Footprint:
    """Return the footprint of a first step with `parts`, which stay as they are.

    An optimizer that this machine does not have is left out, unless the run would be `here`.

    Raises GraftError: what the step itself refuses.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    teacher = [each.model for each in parts.teachers.values()]
    memo = {id(tensor): _faked(mode, tensor) for tensor in _tensors([parts.task, *teacher])}
    task = copy.deepcopy(parts.task, memo)  # with its teachers
    taught = {id(memo[id(tensor)]) for tensor in _tensors(teacher)}
    task.measured()
    own = list(_tensors([task]))
    with mode:
        images, targets = _batch(config, parts)
        with _kept([*own, *(tensor for tensor in memo.values() if id(tensor) in taught)]) as kept:
            with torch.autocast("cpu", MIXED.get(config.engine.precision), config.engine.precision in MIXED):
                loss = task(images, targets)["loss"]
            activations = _bytes(kept)
        check_learns(loss)
        loss.backward()
        gradients = _bytes(p.grad for p in task.parameters() if p.grad is not None)
        slots = _optimizer_bytes(config, task, here)
        average = WeightAverage(task.trainable, 0.5).average.values() if config.optim.ema is not None else ()
    return Footprint(
        student=_bytes(own),
        teacher=_bytes(tensor for tensor in memo.values() if id(tensor) in taught),
        gradients=gradients,
        optimizer=slots,
        average=_bytes(average),
        activations=activations,
    )


def target_bytes(config: RunConfig, parts: Parts) -> int:
    """Return the bytes that `transfer.cache` takes for one image."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    teachers = [each.model for each in parts.teachers.values()]
    memo = {id(tensor): _faked(mode, tensor) for tensor in _tensors([parts.task, *teachers])}
    task: Any = copy.deepcopy(parts.task, memo)
    with mode, torch.autocast("cpu", MIXED.get(config.engine.precision), config.engine.precision in MIXED):
        targets = task.dual.teach(_batch(config, parts)[0])
    sizes: list[int] = [each.element_size() * each[0].numel() for each in targets.values()]
    return CHECKSUM + sum(sizes)


def _optimizer_bytes(config: RunConfig, task: Task, here: bool) -> int:
    """Return the bytes that the optimizer holds after a step, which drops the gradients."""
    try:
        optimizer = create_optimizer(task, task.trainable, config.optim, 1e-3)
    except ConfigError:
        if here:
            raise
        return 0
    alike = _alike(optimizer)
    for _, *others in alike:  # a step of one tells what all hold, in a fraction of the time
        for parameter in others:
            parameter.grad = None
    try:
        optimizer.step()
    except DataDependentOutputException:  # it looks at numbers: take as many slots as the first parameter has
        first: dict[str, Any] = next(iter(optimizer.state.values()), {})
        count = sum(isinstance(slot, Tensor) and slot.dim() > 0 for slot in first.values())
        return count * _bytes(p for group in optimizer.param_groups for p in group["params"])
    return sum(
        len(same) * _bytes(slot for slot in optimizer.state[same[0]].values() if isinstance(slot, Tensor))
        for same in alike
    )


def _alike(optimizer: torch.optim.Optimizer) -> list[list[nn.Parameter]]:
    """Return the parameters with a gradient, those of one group and shape in a list."""
    found: dict[Any, list[nn.Parameter]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter.grad is not None:
                found.setdefault((number, parameter.shape, parameter.dtype), []).append(parameter)
    return list(found.values())


def _tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def _faked(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape on the CPU, where the kernels are that a step would have."""
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def _batch(config: RunConfig, parts: Parts) -> tuple[Tensor, Tensor]:
    """Return images and targets as the training set gives them."""
    data, count = config.data, parts.train_loader.batch_size
    classes = parts.train_loader.num_classes
    if classes and (data.mixup > 0 or data.cutmix > 0):
        targets = torch.empty(count, classes)
    else:
        targets = torch.zeros(count, dtype=torch.long)
    return torch.empty(count, *parts.spec.input_size), targets


@contextmanager
def _kept(others: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the list of the tensors that autograd keeps inside, save those that share the memory of `others`."""
    known = {tensor.untyped_storage()._cdata for tensor in others}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            kept.append(tensor)
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield kept


def _bytes(tensors: Iterable[Any]) -> int:
    """Return the memory of distinct storages."""
    storages = {storage._cdata: storage.nbytes() for storage in (each.untyped_storage() for each in tensors)}
    return sum(storages.values())
