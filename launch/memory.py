"""The memory of a training step on one device, measured by the rehearsal of a dry run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..transfer.engine.dry_run import DryRun
from ..transfer.engine.shard_teachers import shard_units
from ..transfer.engine.students import sharded_teachers

NOT_COUNTED = "the framework, workspaces, images, fragmentation"


@dataclass(frozen=True)
class MemoryItem:
    """One use of memory: its name, its bytes, and how they were counted."""

    name: str
    size: int
    how: str


def memory_items(run: DryRun) -> list[MemoryItem]:
    """Return the items of a training step on one device; divide what FSDP shards by the number of processes."""
    found, task, config = run.footprint, run.parts.task, run.config
    shards = run.processes if config.engine.fsdp else 1
    split = f", over {shards} processes" if shards > 1 else ""
    count, trained = _count(parameter_count(task)), _count(parameter_count(task, trained=True))
    batch = f"{run.parts.train_loader.batch_size} images, {config.engine.precision}"
    if config.student.grad_checkpointing:
        batch += ", block inputs only"
    until = "" if run.targets is None else ", until its targets are computed"
    items = [
        MemoryItem("student", found.student // shards, f"{count} parameters in float32{split}"),
        MemoryItem("gradients", found.gradients // shards, f"{trained} trained{split}"),
        MemoryItem("optimizer", found.optimizer // shards, f"{config.optim.opt}{split}"),
        MemoryItem("moving average", found.average // shards, f"a copy of the student{split}"),
        MemoryItem("teacher", _teacher_size(run), f"frozen, in {_types(run)}{until}{_spread(run)}"),
        MemoryItem("activations", found.activations, batch),
    ]
    return [item for item in items if item.size]


def _teacher_size(run: DryRun) -> int:
    """Return the bytes of the teachers on one device: of a sharded one the shards, and its largest block whole."""
    size = run.footprint.teacher
    for name in sharded_teachers(run.config):
        units = [_bytes(unit) for unit in shard_units(run.parts.teachers[name].model)]
        size += sum(units) // run.processes + max(units, default=0) - sum(units)
    return size


def _spread(run: DryRun) -> str:
    sharded = sharded_teachers(run.config)
    if not sharded:
        return ""
    named = "" if len(run.parts.teachers) == 1 else f" of {' and '.join(sharded)}"
    return f", the blocks{named} over {run.processes} processes and one of them whole"


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _types(run: DryRun) -> str:
    """Name the types of the teachers' weights."""
    kinds = {next(each.model.parameters()).dtype for each in run.parts.teachers.values()}
    return " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))


def parameter_count(model: nn.Module, trained: bool = False) -> int:
    """Count the parameters, or only the trained ones."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def describe_memory(run: DryRun) -> list[str]:
    """Return one line for each item, the sum, and what is not counted."""
    items = memory_items(run)
    width = max(len(item.name) for item in items)
    lines = [f"{item.name:<{width}}  {_gibibytes(item.size):>9}  {item.how}" for item in items]
    total = sum(item.size for item in items)
    return [*lines, f"{'sum':<{width}}  {_gibibytes(total):>9}", f"not counted: {NOT_COUNTED}"]


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
