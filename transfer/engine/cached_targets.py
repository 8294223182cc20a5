"""Before the first step of a run with `transfer.cache`: compute what is missing, then let go of the teachers."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ...checkpoints.atomic import WriteFailedError, write_shared
from ...checkpoints.files import is_url
from ...checkpoints.provenance import digest_tensors
from ...models.cost import counted_macs
from ...models.errors import ConfigError, DataError, GraftError, JsonDict, counted
from ..config import RunConfig
from ..data.loaders import TrainLoader
from ..data.sampler import preserved
from ..data.shard_index import load
from ..methods.dual import DualViT
from ..target_fill import fill
from ..target_forms import TargetForm
from ..target_shards import (
    Field,
    Shard,
    TargetRows,
    TargetShards,
    check_size,
    digest_of,
    gibibytes,
    has_weights,
    write_object,
)
from . import deadline
from .build import Parts, build
from .modes import goal_of
from .optim import Schedule, WeightAverage, create_optimizer
from .parallel import gather, raise_together, read_once, receive
from .resume_check import Position, commits_of
from .runlog import ProgressBar
from .scoring import teacher_top1
from .signals import StopSignals
from .tasks import Task, TransferTask, check_learns

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


logger = logging.getLogger(__name__)
Note = dict[str, float | None]
KEPT_TARGETS = "targets.txt"
"""The file of a run folder that names its cache, written again for each shard that the run adds to it."""


def views_of(config: RunConfig, schedule: Schedule, position: Position) -> list[int]:
    """Return the views that a run shows from a position to its end."""
    left = schedule.total_steps - position.step
    if left <= 0:
        return []
    epochs = -(-(position.epoch_step + left) // schedule.steps_per_epoch)
    count = max(1, config.data.views or 0)
    return sorted({(position.epoch + epoch) % count for epoch in range(epochs)})


def prepare_targets(
    config: RunConfig,
    parts: Parts,
    accelerator: Accelerator,
    group: dist.ProcessGroup | None,
    schedule: Schedule,
    position: Position,
    signals: StopSignals,
) -> None:
    """Fill the cache of a run where it has one, and dismiss the teachers. A stop signal ends it early.

    All processes must call it; each computes a part of what is missing, and so do other runs with the same targets.
    An object that a step finds missing or damaged is computed again by teachers that are loaded again.

    Raises ConfigError: the targets are too large. WriteFailedError: they cannot be written.
    """
    cache = parts.targets
    if cache is None or not isinstance(parts.task, TransferTask):
        return

    def find() -> list[Shard]:
        size = plan_targets(config, parts, cache, schedule, position)
        logger.info("teacher targets: %s", size.describe())
        cache.open()
        return size.todo

    todo = read_once(find, group)
    wanted = config.engine.evaluate_teacher and position.step == 0 and parts.eval_loader is not None
    note: Note | None = None
    with preserved():
        if todo:
            _place(parts, accelerator, group)
            _fill(config, parts, parts.task.dual, accelerator, group, cache, todo, signals)
        if any(gather(signals.received is not None, group)):
            return
        if wanted:
            path = f"{cache.folder}/teacher_top1-{_digest_of_test(parts, group)}.json"
            note = gather(_read_note(path), group)[0]
        if wanted and note is None:
            _place(parts, accelerator, group)
            note = {"teacher_top1": teacher_top1(parts, accelerator)}
            if accelerator.is_main_process:
                _keep_note(path, note)
    parts.cached_top1 = (note or {}).get("teacher_top1") if wanted else None
    parts.rows = TargetRows(cache, Refill(config, parts.origins, cache.folder, accelerator))
    parts.task.dual.dismiss()


@dataclass
class Refill:
    """Computes an object of targets again, in the middle of a run, by teachers that are loaded for it and then stay.

    It holds nothing of the run, which holds it: loader processes end with the last reference to their loader.
    """

    config: RunConfig
    origins: JsonDict
    folder: str
    accelerator: Accelerator

    def __call__(self, shard: Shard) -> None:
        """Raise DataError: the teachers are others than when the run began. WriteFailedError: a disk is full."""
        with preserved():
            loader, cache, dual = self.built
            fill(
                cache,
                [shard],
                loader,
                _teach(dual, cache, self.accelerator),
                moved=lambda images: deadline.moved(),
                again=True,
            )

    @cached_property
    def built(self) -> tuple[TrainLoader, TargetShards, DualViT]:
        """The images, the cache and its teachers, on the device."""
        again = build(self.config, commits=commits_of({"origins": self.origins}))
        cache, dual = again.targets, again.task.taught_by
        if cache is None or dual is None or cache.folder != self.folder:
            raise DataError(
                "transfer.cache lacks targets, and the teacher is another one than when the run began: start the run "
                "again"
            )
        return again.train_loader, cache, dual.to(self.accelerator.device)


def _teach(
    dual: DualViT, cache: TargetShards, accelerator: Accelerator
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return what gives the targets of images, in the form in which they are kept."""

    def teach(images: Tensor) -> dict[str, Tensor]:
        with accelerator.autocast():
            return cache.form.pack(dual.teach(images.to(accelerator.device, non_blocking=True)))

    return teach


def _place(parts: Parts, accelerator: Accelerator, group: dist.ProcessGroup | None) -> None:
    """Move the task and its teachers to the device."""
    for teacher in parts.teachers.values():
        receive(teacher.model, group, accelerator.device)
    parts.task.to(accelerator.device)


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


def _fill(
    config: RunConfig,
    parts: Parts,
    dual: DualViT,
    accelerator: Accelerator,
    group: dist.ProcessGroup | None,
    cache: TargetShards,
    todo: list[Shard],
    signals: StopSignals,
) -> None:
    processes = int(accelerator.num_processes)
    own = len(todo) * int(accelerator.process_index) // processes
    if is_url(cache.root):  # no locks: runs begin at different places, and meet seldom
        own = (own + int(digest_of({"run": str(config.output_dir)}), 16)) % len(todo)
    shown = accelerator.is_main_process and config.engine.progress
    error: GraftError | None = None
    with ProgressBar(sum(shard.size for shard in todo), shown=shown, name="teacher targets") as bar:

        def moved(images: int) -> None:
            deadline.moved()
            bar.advance(images * processes)

        try:
            fill(
                cache,
                todo[own:] + todo[:own],
                parts.train_loader,
                _teach(dual, cache, accelerator),
                stopped=lambda: signals.received is not None,
                moved=moved,
                kept=lambda: write_shared(
                    config.output_dir / KEPT_TARGETS, f"{cache.folder}\n".encode(), replace=True
                ),
            )
        except GraftError as failure:
            error = failure
    raise_together(error, group)


def _digest_of_test(parts: Parts, group: dist.ProcessGroup | None) -> str:
    """Return a digest of what a teacher's accuracy depends on, beside its identity: pixels, targets, names of classes.

    The sum of the images' own digests depends on no order, and so on no number of processes.
    """
    loader, teacher = parts.eval_loader, parts.teacher
    if loader is None or teacher is None or not teacher.has_head:
        return "none"
    total = 0
    for images, targets, valid in loader:
        deadline.moved()
        for image, target in zip(images[valid], targets[valid], strict=True):
            total += int(digest_tensors({"image": image, "target": target}), 16)
    return digest_of(
        {"images": sum(gather(total, group)), "classes": loader.class_names, "names": teacher.label_names}
    )


def _keep_note(place: str, note: Note) -> None:
    """Write the teacher's accuracy. A cache that this user may only read stays as it is."""
    try:
        write_object(place, json.dumps(note).encode())
    except WriteFailedError as error:
        logger.warning("transfer.cache does not keep the teacher's accuracy: %s", error.__cause__ or error)


def _read_note(place: str) -> Note | None:
    """Return the accuracy that was measured before; None without a note that can be read."""
    try:
        top1 = json.loads(load(place) or b"")["teacher_top1"]
        return {"teacher_top1": None if top1 is None else float(top1)}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
