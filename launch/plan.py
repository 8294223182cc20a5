"""What a run would do, in words: nothing is trained, and the weights of a timm teacher are not read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ..checkpoints import provenance
from ..checkpoints.preprocessing import Preprocessing
from ..checkpoints.state import StateFolder
from ..checkpoints.teacher import Head, Teacher
from ..models.copying.input import Normalization
from ..models.errors import GraftError, counted
from ..models.mae import MaskedAutoencoder
from ..transfer.config import RunConfig
from ..transfer.data.loaders import TrainLoader, create_train_loader
from ..transfer.engine.best import choose
from ..transfer.engine.build import (
    align_task,
    check_recomputation,
    find_teacher,
    headless,
    open_eval_loader,
)
from ..transfer.engine.elastic import GlobalBatch, as_started, describe, global_batch
from ..transfer.engine.labels import (
    check_teacher_classes,
    freeze_for,
    needs_labels,
    starting_source,
    student_head,
)
from ..transfer.engine.optim import peak_learning_rate
from ..transfer.engine.resume import (
    Position,
    changes,
    check_length,
    check_same_classes,
    check_same_run,
    check_same_weights,
    commit_of,
    describe_changes,
    refuse_existing,
)
from ..transfer.engine.schedule import Schedule
from ..transfer.engine.students import (
    StudentPlan,
    find_whole,
    input_size,
    plan_student,
    resolve_preprocessing,
)
from ..transfer.methods.dual import DualViT, build_dual
from ..transfer.methods.plan import resolve_plan
from ..transfer.staging.archives import is_packed
from .memory import describe_memory, estimate_memory, parameter_count
from .outline import is_timm_name, outline_teacher


@dataclass
class Outline:
    """The parts of a run, of the right shapes and without weights."""

    config: RunConfig
    spec: Preprocessing
    teacher: Teacher | None
    plan: StudentPlan
    student: nn.Module
    model: nn.Module
    dual: DualViT | None
    loader: TrainLoader | GraftError
    processes: int
    saved: Mapping[str, Any] | None
    """The meta part of the state that the run goes on from; None where it starts."""
    batch: GlobalBatch | None
    """None where the data set could not be read."""
    best: str = ""
    """Which state is the best, in words."""

    @property
    def schedule(self) -> Schedule | None:
        return None if self.batch is None else self.batch.schedule(self.config, self.processes)


def describe_plan(config: RunConfig, processes: int | None = None, *, needs_data: bool = False) -> str:
    """The resolved plan of a run on so many processes; by default those that a launcher has started.

    The data set is read for its size where it is there; without it `data.num_classes` must be given, and `needs_data`
    not.

    Raises:
        GraftError: if the parts do not go together, in one sentence.
    """
    outline = _outline(config, processes or _processes())
    if needs_data and isinstance(outline.loader, GraftError) and not is_packed(config.data):
        raise outline.loader
    rows = [
        ("mode", config.mode),
        ("teacher", _teacher_words(outline)),
        ("student", _student_words(outline)),
        ("images", outline.spec.describe()),
        ("transfer", _transfer_words(outline)),
        ("trained", _trained_words(outline)),
        ("data", _data_words(outline)),
        ("batch", _batch_words(outline)),
        ("learning rate", _rate_words(outline)),
        ("length", _length_words(outline)),
        ("memory", _memory_words(outline)),
        ("best", outline.best),
        ("run folder", str(config.output_dir)),
        ("goes on", _going_on_words(outline)),
    ]
    width = max(len(name) for name, _ in rows) + 2
    lines = []
    for name, words in rows:
        first, *more = words.splitlines() or [""]
        lines += [f"{name:<{width}}{first}", *(f"{'':<{width}}{line}" for line in more)] if words else []
    return "\n".join(lines) + "\n"


def _outline(config: RunConfig, processes: int) -> Outline:
    check_recomputation(config)
    saved = _saved(config)
    whole = find_whole(config.student)
    commit = None if saved is None else commit_of(saved)
    teacher = _teacher(config, input_size(config.student, whole)[1:], commit)
    spec = resolve_preprocessing(config, teacher, whole)
    loader = _loader(config, spec, processes)
    batch = None if isinstance(loader, GraftError) else global_batch(config, loader, processes, saved)
    config = config if saved is None else as_started(config, saved)
    known = Head(config.data.num_classes or 0) if isinstance(loader, GraftError) else loader.head()
    head = student_head(config, known, teacher, whole)
    check_teacher_classes(config, teacher, head.label_names)
    if saved is not None:
        check_same_classes(saved, head.label_names, config.output_dir)
    classes = head.num_classes
    if config.mode == "pretrain":
        plan = plan_student(headless(config.student), classes, None, spec)
    else:
        plan = plan_student(config.student, classes, teacher, spec, whole)
    if saved is not None:
        origins = {"teacher": provenance.of_teacher(teacher)}
        check_same_weights(saved, origins, spec.described(), config.output_dir)
    student = _unfilled(config, lambda: plan.create(config.student.drop_path))
    model, dual = student, None
    if config.mode == "pretrain":
        model = MaskedAutoencoder(student, **config.pretrain.model_dump())
    elif config.mode == "transfer" and teacher is not None:
        normalization = Normalization(spec.mean, spec.std)
        model = dual = build_dual(
            config.transfer, teacher, student, normalization, _calibration(config, spec)
        )
    elif config.mode == "align" and teacher is not None:
        align_task(config, teacher, student, spec)
    freeze_for(config, student if dual is not None else model)
    best = "" if isinstance(loader, GraftError) else _best_words(config, spec, loader, head, student, teacher)
    outline = Outline(
        config, spec, teacher, plan, student, model, dual, loader, processes, saved, batch, best
    )
    if saved is not None and outline.schedule is not None:
        check_length(Position(**saved["position"]), outline.schedule.total_steps)
    return outline


def _saved(config: RunConfig) -> Mapping[str, Any] | None:
    """The meta part of the state in the run folder, which `config` may go on from or has to leave alone."""
    if config.engine.resume == "never":
        refuse_existing(config.output_dir)
        return None
    saved = StateFolder(config.output_dir / "checkpoints").peek()
    if saved is not None:
        check_same_run(saved, config)
    return saved


def _teacher(config: RunConfig, size: tuple[int, int], commit: str | None) -> Teacher | None:
    source = config.teacher.source
    if config.mode in ("transfer", "finetune") and source is not None and is_timm_name(source):
        return outline_teacher(config.teacher, size, empty=_without_storage(config))
    return find_teacher(config, size, commit)


def _loader(config: RunConfig, spec: Preprocessing, processes: int) -> TrainLoader | GraftError:
    """The training set, or why it is not there; it is not downloaded."""
    data = config.data.model_copy(update={"download": False, "workers": 0})
    try:
        return create_train_loader(
            data, spec, seed=config.seed, world_size=processes, labels=needs_labels(config)
        )
    except GraftError as error:
        if config.data.num_classes is None and needs_labels(config):
            raise
        return error


def _best_words(
    config: RunConfig,
    spec: Preprocessing,
    loader: TrainLoader,
    head: Head,
    student: nn.Module,
    teacher: Teacher | None,
) -> str:
    """What picks the best state; the test images are opened as the run will open them."""
    data = config.data.model_copy(update={"download": False, "workers": 0})
    tested = open_eval_loader(config.model_copy(update={"data": data}), spec, loader.num_classes)
    taught = None if teacher is None else teacher.model
    choice = choose(config, head=head, loader=tested, student=student, teacher=taught)
    return "the last state: nothing is evaluated" if choice is None else choice.describe()


def _processes() -> int:
    """How many a launcher has started; torchrun and accelerate tell it this way."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _without_storage(config: RunConfig) -> bool:
    """Matching heads runs both models, on noise here; a masked autoencoder copies its encoder's positions."""
    return config.mode != "pretrain" and config.transfer.heads != "match"


def _unfilled(config: RunConfig, create: Callable[[], nn.Module]) -> nn.Module:
    if not _without_storage(config):
        return create()
    with init_empty_weights():
        return create()


def _calibration(config: RunConfig, spec: Preprocessing) -> Any:
    return torch.randn(2, *spec.input_size) if config.transfer.heads == "match" else None


def _teacher_words(outline: Outline) -> str:
    teacher = outline.teacher
    if teacher is None:
        return ""
    source = outline.config.teacher.source or ""
    read = "weights not read for this plan" if is_timm_name(source) else "weights read"
    head = "with a head" if teacher.has_head else "without a head"
    count = parameter_count(teacher.model)
    return f"{source}: {teacher.architecture}, {count / 1e6:.1f} M parameters, {head}, frozen; {read}"


def _student_words(outline: Outline) -> str:
    start = starting_source(outline.config) or "fresh weights"
    count = parameter_count(outline.student)
    classes = outline.plan.arguments["num_classes"]
    return (
        f"{outline.plan.architecture}: {count / 1e6:.1f} M parameters, "
        f"{f'{classes} classes' if classes else 'no head'}, from {start}"
    )


def _transfer_words(outline: Outline) -> str:
    dual, settings = outline.dual, outline.config.transfer
    if dual is None:
        return ""
    lines = [dual.describe()]
    if settings.heads == "match":
        # those of the run are measured on its first batch of images, these were measured on noise
        plan = resolve_plan(settings, dual.teacher, dual.student)
        lines = [*plan.describe(), *dual.teacher_input.describe()]
    loss = f"loss: {settings.weight:g} x the {settings.reduction} over layers"
    if settings.temperature != 1:
        loss += f", temperature {settings.temperature:g}"
    if settings.rows < 1:
        loss += f", {settings.rows:.0%} of the query rows"
    if dual.needs_teacher:
        count = parameter_count(dual.teacher_part)
        loss = f"the student leaves with the part of its teacher that it runs with, {count / 1e6:.1f} M parameters"
    return "\n".join([*lines, loss])


def _trained_words(outline: Outline) -> str:
    trained, count = parameter_count(outline.model, trained=True), parameter_count(outline.model)
    return f"{trained:,} of {count:,} parameters"


def _data_words(outline: Outline) -> str:
    if isinstance(outline.loader, GraftError):
        return f"not read: {outline.loader}"
    classes = outline.loader.num_classes
    return (
        f"{outline.loader.num_samples:,} training images, {f'{classes} classes' if classes else 'no labels'}"
    )


def _batch_words(outline: Outline) -> str:
    data, optim, batch = outline.config.data, outline.config.optim, outline.batch
    size, accum = data.batch_size, optim.accum_iter
    if batch is not None:
        size, accum = batch.batch_size, batch.micro_batches // outline.processes
    processes = counted(outline.processes, "process")
    return f"{size} x {accum} accumulated x {processes} = {size * accum * outline.processes} images"


def _rate_words(outline: Outline) -> str:
    data, optim, schedule = outline.config.data, outline.config.optim, outline.schedule
    peak, effective = peak_learning_rate(optim, data.batch_size, outline.processes)
    if schedule is not None:
        peak, effective = schedule.peak, schedule.effective_batch
    why = f"blr {optim.blr:g} x {effective} / 256" if optim.lr is None else "as given"
    return f"{peak:g} ({why}), down to {min(optim.min_lr, peak):g}; layer decay {optim.layer_decay:g}"


def _length_words(outline: Outline) -> str:
    optim, schedule = outline.config.optim, outline.schedule
    if schedule is None:
        return counted(optim.max_steps, "step") if optim.max_steps else counted(optim.epochs, "epoch")
    words = (
        f"{schedule.total_steps:,} steps, {schedule.steps_per_epoch:,} an epoch, "
        f"{schedule.warmup_steps:,.0f} of them warm-up"
    )
    if schedule.warmup_steps < schedule.total_steps:
        return words
    return f"{words}\nwarning: it ends in its warm-up, before the peak of the learning rate: lower optim.warmup_epochs"


def _going_on_words(outline: Outline) -> str:
    saved, batch = outline.saved, outline.batch
    if saved is None:
        return ""
    step, schedule = saved["position"]["step"], outline.schedule
    if schedule is not None and step >= schedule.total_steps:
        return "no more: all its steps are done"
    changed = describe_changes(changes(saved, outline.config))
    words = f"after step {step:,}" + (f"\n{changed}" if changed else "")
    if batch is None or saved["world_size"] == outline.processes:
        return words
    return f"{words}\n{describe(batch, saved['world_size'], outline.processes)}"


def _memory_words(outline: Outline) -> str:
    layers = len(outline.dual.plan.links) if outline.dual is not None else 0
    shards = outline.processes if outline.config.engine.fsdp else 1
    teacher = outline.teacher.model if outline.dual is not None and outline.teacher is not None else None
    items = estimate_memory(outline.config, outline.model, outline.student, teacher, layers, shards)
    return "a device, roughly\n" + "\n".join(describe_memory(items))
