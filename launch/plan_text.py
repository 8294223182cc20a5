"""Describe what a run would do. `transfer/engine/dry_run.py` builds the run; nothing is trained or downloaded."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import nn

from ..checkpoints.card import MATCHES
from ..models.conversion import ARCHITECTURE as CONVERTED
from ..models.errors import counted
from ..models.families import pooling_of
from ..transfer.config import OptimConfig, RunConfig
from ..transfer.data.archives import is_packed
from ..transfer.engine.dry_run import DryRun, dry_run
from ..transfer.engine.elastic import describe
from ..transfer.engine.optim import WARMUP, Schedule, describe_batch, peak_learning_rate
from ..transfer.engine.parallel import node_size
from ..transfer.engine.resume_check import changes, describe_changes
from ..transfer.engine.shard_teachers import shard_units
from ..transfer.engine.students import sharded_teachers
from ..transfer.engine.tasks import AlignTask
from ..transfer.methods.loss_terms import Term

# The memory of a training step on one device, measured by the rehearsal of a dry run.

SHAPES = {"cosine": "down to", "steps": "in tenths, at least", "poly": "by a power, down to"}
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
    shards = node_size(run.processes) if config.engine.fsdp == "node" else run.processes
    shards = shards if config.engine.fsdp else 1
    split = f", over {shards} processes" if shards > 1 else ""
    count, trained = _format_count(parameter_count(task)), _format_count(parameter_count(task, trained=True))
    batch = f"{run.parts.train_loader.batch_size} images, {config.engine.precision}"
    if config.student.grad_checkpointing:
        batch += ", block inputs only"
    until = "" if run.targets is None else ", until its targets are computed"
    items = [
        MemoryItem("student", found.student // shards, f"{count} parameters in float32{split}"),
        MemoryItem("gradients", found.gradients // shards, f"{trained} trained{split}"),
        MemoryItem("optimizer", found.optimizer // shards, f"{config.optim.opt}{split}"),
        MemoryItem("moving average", found.average // shards, f"a copy of the student{split}"),
        MemoryItem(
            "teacher",
            _count_teacher_bytes(run),
            f"frozen, in {_name_types(run)}{until}{_describe_spread(run)}",
        ),
        MemoryItem("activations", found.activations, batch),
    ]
    return [item for item in items if item.size]


def _count_teacher_bytes(run: DryRun) -> int:
    """Return the bytes of the teachers on one device: of a sharded one the shards, and its largest block whole."""
    size = run.footprint.teacher
    for name in sharded_teachers(run.config):
        blocks = shard_units(run.parts.teachers[name].model)
        units = [sum(each.nbytes for each in unit.parameters()) for unit in blocks]
        size += sum(units) // node_size(run.processes) + max(units, default=0) - sum(units)
    return size


def _describe_spread(run: DryRun) -> str:
    sharded = sharded_teachers(run.config)
    if not sharded:
        return ""
    named = "" if len(run.parts.teachers) == 1 else f" of {' and '.join(sharded)}"
    return f", the blocks{named} over {node_size(run.processes)} processes and one of them whole"


def _name_types(run: DryRun) -> str:
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
    lines = [f"{item.name:<{width}}  {_format_bytes(item.size):>9}  {item.how}" for item in items]
    total = sum(item.size for item in items)
    return [*lines, f"{'sum':<{width}}  {_format_bytes(total):>9}", f"not counted: {NOT_COUNTED}"]


def _format_count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


def _format_bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def describe_plan(config: RunConfig, processes: int | None = None, *, needs_data: bool = False) -> str:
    """Describe the resolved run.

    Args:
        config: The run.
        processes: Number of processes on another machine; by default the run is on this machine, with the processes
            that a launcher started.
        needs_data: Refuse a run whose data set is not on this machine. By default `data.num_classes` is enough.

    Raises:
        GraftError: the error that the run would raise before or in its first step.
    """
    run = dry_run(config, processes or int(os.environ.get("WORLD_SIZE", "1")), here=processes is None)
    if needs_data and run.absent is not None and not is_packed(config.data):
        raise run.absent
    targets = run.targets
    rows = [
        ("mode", config.mode),
        ("teacher", _describe_teacher(run)),
        ("student", _describe_student(run)),
        ("head", _describe_head(run)),
        ("images", run.parts.spec.describe() if config.dense.head is None else ""),
        ("transfer", _describe_transfer(run)),
        ("alignment", _describe_alignment(run)),
        ("targets", "" if targets is None else f"{targets.describe()}\n{targets.describe_cost()}"),
        ("trained", _describe_trained(run)),
        ("data", _describe_data(run)),
        ("kept views", _describe_kept_views(run)),
        ("batch", _describe_batch(run)),
        ("learning rate", _describe_rate(run)),
        ("length", _describe_length(run)),
        ("memory", "\n".join(["a device, roughly", *describe_memory(run)])),
        ("best", _describe_best(run)),
        ("run folder", str(config.output_dir)),
        ("resumes", _describe_resume(run)),
    ]
    width = max(len(name) for name, _ in rows) + 2
    lines = []
    for name, words in rows:
        first, *more = words.splitlines() or [""]
        lines += [f"{name:<{width}}{first}", *(f"{'':<{width}}{line}" for line in more)] if words else []
    return "\n".join(lines) + "\n"


def _describe_teacher(run: DryRun) -> str:
    teachers = dict(run.parts.teachers)
    if not teachers and run.parts.loaded is not None:
        teachers = {"teacher": run.parts.loaded}
    lines = []
    for name, teacher in teachers.items():
        read = (
            "weights not read for this plan" if next(teacher.model.parameters()).is_meta else "weights read"
        )
        head = "with a head" if teacher.has_head else "without a head"
        count = parameter_count(teacher.model)
        named = f"{name}: " if len(teachers) > 1 else ""
        lines.append(
            f"{named}{teacher.source}: {teacher.architecture}, {count / 1e6:.1f} M parameters, {head}, frozen; {read}"
        )
    return "\n".join(lines)


def _describe_student(run: DryRun) -> str:
    plan, start = run.parts.plan, run.config.start
    count, classes = parameter_count(run.parts.task.backbone), plan.arguments["num_classes"]
    name = plan.architecture
    if name == CONVERTED:
        name = f"{plan.arguments['architecture']} converted by '{plan.arguments['plan']}'"
    pooling = pooling_of(run.parts.task.backbone)
    pooled = f", pooled by {pooling}" if pooling else ""
    head = f"{classes} classes" if classes else "no head"
    words = f"{name}: {count / 1e6:.1f} M parameters{pooled}, {head}, from {start}"
    return "\n".join([words, *(f"warning: {warning}" for warning in run.parts.warnings)])


def _describe_head(run: DryRun) -> str:
    dense, count = run.config.dense, parameter_count(run.parts.task)
    if dense.head is None or run.config.facts.aligns:
        return ""
    start = "from fresh weights" if dense.source is None else f"from {dense.source}"
    sides = ", ".join(map(str, dense.short))
    return (
        f"{dense.head} {start}: {count / 1e6:.1f} M parameters with its backbone; images with a shorter side of "
        f"{sides}, at most {dense.long}; the memory below is without the head"
    )


def _describe_transfer(run: DryRun) -> str:
    dual = run.parts.task.taught_by
    if dual is None:
        return ""
    lines = [dual.describe()]
    for term in dual.terms:
        settings, name = term.settings, f"loss {term.label}: " if term.label else "loss: "
        if term.method.copies:
            continue
        loss = f"{name}{settings.weight:g} x {_describe_parts(term)}"
        if settings.temperature != 1:
            loss += f", temperature {settings.temperature:g}"
        if settings.standardize != "none":
            loss += (
                f", standardized ({settings.standardize}) on {settings.standardize_images:,} training images"
            )
        if settings.rows < 1:
            loss += f", {settings.rows:.0%} of the query rows"
        lines.append(loss)
    losses = [term.settings for term in dual.terms if not term.method.copies]
    if losses and not any(settings.weight for settings in losses):
        lines.append("note: no teacher teaches, because the weight of each transfer loss is 0")
    if dual.needs_teacher:
        count = parameter_count(dual.teacher_part)
        lines.append(
            f"the student is saved with the part of its teacher that it needs, {count / 1e6:.1f} M parameters"
        )
    return "\n".join(lines)


def _describe_parts(term: Term) -> str:
    if term.method.uses_layers:
        count = len(term.plan.links)
        return f"the {term.settings.reduction} over {count} layers" if count > 1 else "the loss of one layer"
    names = " + ".join(term.method.loss_names(term.settings))
    return f"({names})" if " + " in names else names


def _describe_alignment(run: DryRun) -> str:
    task = run.parts.task
    if not isinstance(task, AlignTask):
        return ""
    layers = ", ".join(map(str, task.alignment.layers))
    match = run.config.align.match
    return f"layers {layers} learn on the inputs of the teacher's layers; match={match}: {MATCHES[match]}"


def _describe_trained(run: DryRun) -> str:
    task = run.parts.task
    return f"{parameter_count(task, trained=True):,} of {parameter_count(task):,} parameters"


def _describe_data(run: DryRun) -> str:
    loader = run.parts.train_loader
    if run.absent is not None:
        return f"not read: {run.absent}"
    classes = loader.num_classes
    words = f"{loader.num_samples:,} training images, {f'{classes} classes' if classes else 'no labels'}"
    if loader.repeats == 1:
        return words
    times = min(loader.repeats, loader.num_samples)
    shown = -(-loader.num_samples // times)
    return f"{words}; an epoch shows {shown:,} of them {times} times each, with other augmentation"


def _describe_kept_views(run: DryRun) -> str:
    kept = run.parts.train_loader.kept
    if kept is None:
        return ""
    whole, there = kept.count_bytes(run.views)
    views = counted(len(run.views), "view")
    return f"{views}, {_format_bytes(whole)} in {kept.folder}, of which {_format_bytes(there)} are there"


def _describe_best(run: DryRun) -> str:
    if run.absent is not None:
        return ""
    choice = run.parts.choice
    return "the last state: nothing is evaluated" if choice is None else choice.describe()


def _describe_batch(run: DryRun) -> str:
    data, optim, batch = run.config.data, run.config.optim, run.batch
    size, accum = data.batch_size, optim.accum_iter
    if batch is not None:
        size, accum = batch.batch_size, batch.micro_batches // run.processes
    processes = counted(run.processes, "process")
    images = size * accum * run.processes
    words = f"{size} x {accum} accumulated x {processes} = {images} images"
    if run.saved is not None:
        return words
    differs = describe_batch(optim, data.batch_size, run.processes, images)
    return f"{words}\nnote: {differs}" if differs else words


def _describe_rate(run: DryRun) -> str:
    data, optim, schedule = run.config.data, run.config.optim, run.schedule
    peak, effective = peak_learning_rate(optim, data.batch_size, run.processes)
    if schedule is not None:
        peak, effective = schedule.peak, schedule.effective_batch
    why = f"blr {optim.blr:g} x {effective} / 256" if optim.lr is None else "as given"
    words = f"{peak:g} ({why}), {SHAPES[optim.schedule]} {min(optim.min_lr, peak):g}; layer decay {optim.layer_decay:g}"
    return "; ".join([words, *(f"x {scale:g} for {name!r}" for name, scale in optim.scales.items())])


def _describe_length(run: DryRun) -> str:
    optim, schedule = run.config.optim, run.schedule
    if schedule is None:
        return counted(optim.max_steps, "step") if optim.max_steps else counted(optim.epochs, "epoch")
    return f"{schedule.total_steps:,} steps, {schedule.steps_per_epoch:,} an epoch, {_describe_warmup(optim, schedule)}"


def _describe_warmup(optim: OptimConfig, schedule: Schedule) -> str:
    steps, given = schedule.warmup_steps, optim.warmup_epochs
    words = f"{steps:,.0f} of them warm-up" if steps >= 10 else f"{steps:.2g} of them warm-up"
    if steps == optim.warmup_steps:
        return words
    if schedule.total_steps == 1 or steps == (WARMUP if given is None else given) * schedule.steps_per_epoch:
        return words
    longer = "" if given is None else f", as optim.warmup_epochs={given:g} is as long as the run or longer"
    return f"{words} (a tenth of the run{longer})"


def _describe_resume(run: DryRun) -> str:
    saved, batch = run.saved, run.batch
    if saved is None:
        return ""
    step, schedule = saved["position"]["step"], run.schedule
    if schedule is not None and step >= schedule.total_steps:
        return "no: all its steps are done"
    changed = describe_changes(changes(saved, run.config))
    words = f"after step {step:,}" + (f"\n{changed}" if changed else "")
    if batch is None or saved["world_size"] == run.processes:
        return words
    return f"{words}\n{describe(batch, saved['world_size'], run.processes)}"
