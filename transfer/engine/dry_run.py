"""The dry run: build a run without weights, check everything that its first step checks, and say what it takes.

A run itself asks here what `transfer.cache` lacks, and how large that is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ...checkpoints.state import StateFolder
from ...models.cost import counted_macs
from ...models.errors import ConfigError, GraftError, Json, counted, gibibytes
from ..config import RunConfig
from ..data.loaders import AbsentTrainLoader
from ..staging import check_stage
from ..target_shards import Field, Shard, TargetForm, TargetShards, check_size, has_weights
from .build import Parts, build
from .elastic import GlobalBatch, settle
from .modes import goal_of
from .optim import Schedule, WeightAverage, create_optimizer
from .parallel import check_placement
from .resume_check import Position, as_begun, check_length, check_same_run, commits_of, refuse_existing
from .tasks import Task, check_learns

# The first step of a run on tensors that have shapes and no memory: what it would keep, and what it would refuse.
#
# torch's fake tensors run every operation for its shapes alone, in a second or two for a large model, so the
# sizes are those of the step itself: of whatever method, operators and frozen parameters the run has.

RATE = 4e14
"""Operations of a device in a second, for hours in a dry run: two fifths of what an H100 does in bf16."""
MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Footprint:
    """Bytes of a step on one device, not sharded."""

    student: int
    """Parameters and buffers of the task."""
    teacher: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    """Tensors that the forward pass keeps for the backward pass."""


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
                loss = task.rehearsed(images, targets)["loss"]
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


def rehearse_teachers(config: RunConfig, parts: Parts, form: TargetForm) -> tuple[list[Field], float]:
    """Return what `transfer.cache` keeps of an image, and the operations (FLOP) of the teachers for it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    teachers = [each.model for each in parts.teachers.values()]
    memo = {id(tensor): _faked(mode, tensor) for tensor in _tensors([parts.task, *teachers])}
    task: Any = copy.deepcopy(parts.task, memo)
    fields: list[Field] = []
    with mode, torch.autocast("cpu", MIXED.get(config.engine.precision), config.engine.precision in MIXED):
        images = _batch(config, parts)[0]

        def teach() -> None:
            fields.extend(Field.of(*each) for each in form.pack(task.dual.teach(images)).items())

        macs = counted_macs(teach)
    return fields, 2 * macs / len(images)


def _optimizer_bytes(config: RunConfig, task: Task, here: bool) -> int:
    """Return the bytes that the optimizer holds after a step, which drops the gradients."""
    try:
        optimizer = create_optimizer(task, task.layered, config.optim, 1e-3)
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
    channels, size = parts.spec.input_size[0], goal_of(config).image_size(parts.spec, parts.task.backbone)
    return torch.empty(count, channels, *size), targets


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


# What `transfer.cache` would keep.


def views_of(config: RunConfig, schedule: Schedule, position: Position) -> list[int]:
    """Return the views that a run shows from a position to its end."""
    left = schedule.total_steps - position.step
    if left <= 0:
        return []
    epochs = -(-(position.epoch_step + left) // schedule.steps_per_epoch)
    count = max(1, config.data.views or 0)
    return sorted({(position.epoch + epoch) % count for epoch in range(epochs)})


@dataclass(frozen=True)
class CacheSize:
    """What a run keeps, where, and how much of it is there."""

    cache: TargetShards
    shards: list[Shard]
    todo: list[Shard]
    whole: int
    """Bytes of all shards."""
    missing: int
    """Bytes of the shards to compute."""
    flop: float
    """Operations of the teachers for an image."""
    shown: int
    """Images that the run shows: as many as its teachers would see without a cache."""

    def describe_cost(self) -> str:
        """Say how long the teachers compute, and what a sweep saves."""
        own, without = (
            images * self.flop / RATE / 3600
            for images in (sum(shard.size for shard in self.todo), self.shown)
        )
        return (
            f"{self.flop / 1e9:,.3g} GFLOP an image: {own:.2g} hours of a device at {RATE / 1e12:.0f} TFLOP/s; without "
            f"the cache {without:.2g} in this run, and in each further run that reads these targets"
        )

    def describe(self) -> str:
        """Return it in words."""
        views = counted(len({shard.view for shard in self.shards}), "view")
        files = counted(len(self.shards), "file")
        if not has_weights(self.cache):
            where = f"{gibibytes(self.whole)} in {self.cache.root}"
            return (
                f"{self.cache.samples:,} images in {views}, {where}; the weights say whether they are there"
            )
        state = (
            f"{len(self.todo):,} of {files} to compute"
            if self.todo
            else f"{files}, complete: no teacher runs"
        )
        return f"{self.cache.samples:,} images in {views}, {gibibytes(self.whole)} in {self.cache.folder}: {state}"


def plan_targets(
    config: RunConfig,
    parts: Parts,
    cache: TargetShards,
    schedule: Schedule,
    position: Position,
    *,
    here: bool = True,
) -> CacheSize:
    """Return what a run keeps of its teachers from a position on; what is not there is counted without computing it.

    `here`: the run is on this machine, whose disk is known. Files are listed, and not read.

    Raises ConfigError: the targets are too large.
    """
    shards = cache.shards(views_of(config, schedule, position))
    known = has_weights(cache)
    stored = cache.stored(shards) if known else {}
    todo = [shard for shard in shards if shard not in stored]
    fields, flop = rehearse_teachers(config, parts, cache.form)
    missing = sum(cache.size(shard, fields) for shard in todo)
    whole = sum(stored.values()) + missing
    check_size(cache.root, config.transfer.cache_limit, whole, missing, here=here and known)
    shown = (schedule.total_steps - position.step) * schedule.effective_batch
    return CacheSize(cache, shards, todo, whole, missing, flop, shown)


# The run without weights.


@dataclass(frozen=True)
class DryRun:
    """The parts of a run, without weights."""

    config: RunConfig
    """The settings; if the run resumes, those that it was started with."""
    parts: Parts
    processes: int
    saved: Json | None
    """The meta part of the state that the run resumes from; None for a new run."""
    batch: GlobalBatch | None
    """Images of a step; None if the training set is not on this machine."""
    footprint: Footprint
    targets: CacheSize | None = None
    """Content of `transfer.cache`; None without a cache, or if the training set is not on this machine."""
    views: Sequence[int] = ()
    """Views of the training images that the run shows; none if the training set is not on this machine."""

    @property
    def schedule(self) -> Schedule | None:
        """Images of a step; None if the training set is not on this machine."""
        return None if self.batch is None else self.batch.schedule(self.config, self.processes)

    @property
    def absent(self) -> GraftError | None:
        """Return why the training set could not be read, if it may be on another machine."""
        loader = self.parts.train_loader
        return loader.reason if isinstance(loader, AbsentTrainLoader) else None


def dry_run(config: RunConfig, processes: int, *, here: bool) -> DryRun:
    """Build `config` without weights for `processes` processes, and rehearse its first step.

    `here`: the run would be on this machine, whose device is known.

    Raises GraftError: the run would raise the same error before or in its first step.
    """
    on_cpu = config.engine.device == "cpu" or (here and not torch.cuda.is_available())
    check_placement(config, processes, on_cpu=on_cpu)
    if config.data.stage is not None:
        check_stage(config.data, here=here)
    saved = _saved(config)
    commits = {} if saved is None else commits_of(saved)
    config = config if saved is None else as_begun(config, saved)
    parts = build(config, world_size=processes, commits=commits, weights=False)
    batch = None
    if not isinstance(parts.train_loader, AbsentTrainLoader):
        config, batch = settle(config, parts, processes, saved)
    run = DryRun(config, parts, processes, saved, batch, rehearse(config, parts, here=here))
    if run.schedule is None:
        return run
    position = Position() if saved is None else Position(**saved["position"])
    check_length(position, run.schedule.total_steps)
    cache, targets = parts.targets, None
    if cache is not None:
        targets = plan_targets(config, parts, cache, run.schedule, position, here=here)
    views = views_of(config, run.schedule, position)
    kept = parts.train_loader.kept
    lack = kept.find_lack(views) if kept is not None and here else None
    if lack is not None:
        raise lack
    return replace(run, targets=targets, views=views)


def _saved(config: RunConfig) -> Json | None:
    """Return the meta part of the state in the run folder, if any. Raise GraftError if `config` cannot resume it."""
    refuse_existing(config.output_dir, config.engine.resume)
    if config.engine.resume == "never":
        return None
    saved = StateFolder(config.output_dir / "checkpoints").peek()
    if saved is not None:
        check_same_run(saved, config)
    return saved
