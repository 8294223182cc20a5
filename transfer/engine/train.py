"""`train(config)`: run or resume a training in any mode."""

from __future__ import annotations

import logging
import uuid
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from ...checkpoints import provenance
from ...checkpoints.atomic import WriteFailedError, write_text
from ...checkpoints.pretrained import load, load_pretrained
from ...checkpoints.provenance import Pretrained
from ...checkpoints.state import StateFolder, TrainingState
from ...checkpoints.student import write_student
from ...models.copied import copy_attention
from ...models.errors import GraftError, Json, check_types
from ...models.lora import merged
from ...models.plain_yaml import write_yaml
from ...models.small import without_memory
from ..config import DataConfig, RunConfig
from ..data.image_folder import INDEX, Found, keep_index, listed
from ..data.sampler import preserved
from .build import Parts, build, check_settings
from .cached_targets import prepare_targets
from .dry_run import views_of
from .elastic import GlobalBatch, describe, settle
from .fence import Fence
from .fit_operators import fit_operators, leave_to_us, measure_features, stage_together
from .loop import Loop, SharedBatches
from .modes import mode_of
from .optim import Schedule, WeightAverage, create_optimizer, describe_batch
from .parallel import (
    create_accelerator,
    gather,
    gather_each,
    host_group,
    list_together,
    patient,
    raise_together,
    read_once,
    receive,
    student_mesh,
)
from .resume_check import (
    Position,
    as_begun,
    check_length,
    check_same_code,
    check_same_run,
    check_same_split,
    commits_of,
    refuse_existing,
    settings,
)
from .run_state import RunState, position_of
from .runlog import Meters, ProgressBar, Recorder, RunLog, create_trackers, hyperparameters
from .scoring import score, teacher_top1
from .shard_teachers import shard_teachers
from .signals import StopSignals
from .tasks import Task
from .weight_rows import find_student_mesh, shard

if TYPE_CHECKING:
    from ..verdict import Verdict

# Export the student of a finished run, and its average, in timm's layout.


def export_students(
    parts: Parts,
    average: WeightAverage | None,
    folder: Path,
    meta: Json,
    *,
    fence: Fence,
    writes: bool,
    group: dist.ProcessGroup | None,
) -> None:
    """Write `student/` and `student_ema/`; for a masked autoencoder, only the encoder.

    The weights are those of a new timm model of the same arguments, so it contains nothing of the training; a student
    that copies attention gets the part of the teacher that it needs. `meta` is the meta part of a state.
    All processes must call it; only the first one writes.
    """
    own = parts.task.trainable.state_dict()
    named = {"student": own}
    if average is not None:
        # Integer buffers have no average: use the student's own.
        named["student_ema"] = own | average.average
    with without_memory():
        model = parts.plan.create()
    changed = _body(parts.task, own).keys() != model.state_dict().keys()
    planned = None if changed or parts.task.pruned or parts.plan.copying is not None else model
    for name, tensors in named.items():
        made = provenance.of_state(meta, "ema" if name == "student_ema" else "student")
        values = gather_each(tensors if planned is None else _body(parts.task, tensors), keep=writes)
        error: GraftError | None = None
        if writes:
            try:
                with fence.guard():
                    _export(parts, planned, values, folder / name, made)
            except GraftError as failure:
                failure.exit_code = 1
                error = failure
        deque(values, maxlen=0)  # every process takes part until the last tensor
        raise_together(error, group)


def _body(task: Task, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the model that leaves the run, by its own names."""
    prefix = task.prefix
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _export(
    parts: Parts,
    planned: nn.Module | None,
    values: Iterator[tuple[str, Tensor]],
    folder: Path,
    made: Json,
) -> None:
    """Write a student with `values`: as `planned`, tensor by tensor, or put together from all of them (None)."""
    plan, beside = parts.plan, None
    if planned is None:
        tensors = dict(values)
        planned = _put_together(parts, tensors)
        beside = partial(parts.task.write_beside, tensors)
    write_student(
        planned,
        folder,
        architecture=plan.architecture,
        model_args=plan.arguments,
        preprocessing=plan.preprocessing,
        license=provenance.carried_license(made),
        provenance=made,
        label_names=plan.label_names,
        beside=beside,
        values=values,
    )


def _put_together(parts: Parts, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return the student in memory: with its adapters merged, and with the part of the teacher that it copies."""
    plan, task = parts.plan, parts.task
    with preserved():
        model = plan.create()
    model.load_state_dict(merged(_body(task, tensors)), strict=not task.pruned)
    if plan.copying is not None and parts.teacher is not None:
        copy_attention(model, parts.teacher.model, plan.copying)
    return model


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """The result of a run. `signal` is the one that stopped it after a save.

    `metrics` are those of the last evaluation, with `teacher_top1` and the best value of the metric that selects the
    best state (`best_top1`, `best_relative_error`, ...) if there are any.
    """

    metrics: dict[str, float]
    output_dir: Path
    steps: int
    finished: bool
    signal: int | None
    verdict: Verdict | None = None
    """How a finished run went; None in other processes than the first one, and with engine.report=false."""

    def to_model(self) -> nn.Module:
        """Return the student of the run, as `graftvit.load` does."""
        return load(self.output_dir)

    def to_pretrained(self) -> Pretrained:
        """Return the student of the run, as `graftvit.load_pretrained` does."""
        return load_pretrained(self.output_dir)


@check_types()
def train(config: RunConfig) -> RunResult:
    """Run `config` to its end; resume from the last state in its output_dir, if any.

    Args:
        config: the settings of the run, those of `graftvit train`.

    Returns:
        How the run ended: its last metrics, its folder, and the verdict of a finished one.

    Raises:
        GraftError: with exit code 2 for a mistake in the settings, 1 if the run could not continue.
    """
    RunConfig.model_validate(config.model_dump(warnings=False))  # what `model_copy` made was never checked
    accelerator = create_accelerator(config)
    with company(config, accelerator) as alone:
        steps = training(config, accelerator, alone)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value


@dataclass
class Company:
    """What the runs that take turns in a process have in common; a run alone is one of these, too."""

    group: dist.ProcessGroup | None
    signals: StopSignals
    stack: ExitStack
    """What ends after the last run."""
    several: bool
    shared: SharedBatches | None = None
    """The batches of several runs, once the first one is built."""


@contextmanager
def company(config: RunConfig, accelerator: Accelerator, *, several: bool = False) -> Iterator[Company]:
    """Listen to stop signals within the block, in which one run or several take turns."""
    group = host_group(accelerator)
    with StopSignals(group, config.engine.stop_grace) as signals, ExitStack() as stack:
        yield Company(group, signals, stack, several)


def training(config: RunConfig, accelerator: Accelerator, others: Company) -> Generator[int, None, RunResult]:
    """Do what `train` does, and yield before each step the steps done, so that the `others` may take their turn."""
    group, signals = others.group, others.signals
    with _fence(config, accelerator, group) as fence:
        with patient(group) as waiting:
            state = _find_state(config, fence, waiting)
        data = stage_together(config.data, group, lambda: signals.received is not None)
        early = _signal(signals, group)
        if early is not None:
            return _unbegun(config, state, early)
        commits = {} if state is None else commits_of(state.meta)
        config = config if state is None else as_begun(config, state.meta)
        rank, world = accelerator.process_index, accelerator.num_processes
        here = config.model_copy(update={"data": data})
        check_settings(mode_of(here))  # before folders are looked through
        index = config.output_dir / INDEX
        with patient(group) as waiting:
            splits = data.train_split, data.val_split if config.evaluates else None
            found = list_together(data, splits, waiting, index)
            others.stack.enter_context(listed(found))
            mesh = find_student_mesh(here, accelerator, group)
            parts = build(here, rank=rank, world_size=world, commits=commits, group=waiting, mesh=mesh)
        check_same_code(gather(parts.origins, group))
        check_same_split(gather(parts.eval_loader is not None, group))
        early = _signal(signals, group)
        if early is not None:
            return _unbegun(config, state, early)
        position = Position(run_id=uuid.uuid4().hex) if state is None else position_of(state)
        config, batch = settle(config, parts, world, None if state is None else state.meta)
        planned = batch.schedule(config, world)
        if (kept := parts.train_loader.kept) is not None:
            raise_together(kept.find_lack(views_of(config, planned, position)), group)
        prepare_targets(here, parts, accelerator, group, planned, position, signals)
        early = _signal(signals, group)
        if early is not None:
            return _unbegun(config, state, early)
        if state is None and not fit_operators(here, parts, accelerator, group, signals):
            return _unbegun(config, state, _signal(signals, group))
        run_state, schedule = _prepare(config, accelerator, group, parts, fence, batch)
        if state is None:
            measure_features(here, parts, accelerator)
        else:
            parts.task.measured()
        check_length(position, schedule.total_steps)
        if others.several and others.shared is None:
            others.shared = SharedBatches(parts.train_loader, parts.spec, accelerator, schedule.accum)
        if others.shared is not None:
            others.shared.check(parts.spec, config.output_dir.name)
        leads = others.shared is None or others.shared.loader is parts.train_loader
        if accelerator.is_main_process and data.stage is None:
            _keep_index(found, index, fence)
        with _recorder(
            config, parts, accelerator, run_state.log, position, schedule, shown=leads, several=others.several
        ) as recorder:
            loop = Loop(
                config, accelerator, parts, run_state, schedule, recorder, signals, position, others.shared
            )
            _start(loop, state)
            del state  # as large as all trained parameters, and the run is long
            try:
                stopped = yield from loop.run()
            finally:
                run_state.wait()
        if loop.finished:
            export_students(
                parts,
                run_state.average,
                config.output_dir,
                run_state.meta(position),
                fence=fence,
                writes=accelerator.is_main_process,
                group=group,
            )
        verdict = _conclude(loop, data, fence) if loop.finished and signals.received is None else None
    best = {} if position.best is None else {f"best_{position.best_metric}": position.best}
    return RunResult(
        {**position.metrics, **best}, config.output_dir, position.step, loop.finished, stopped, verdict
    )


def _conclude(loop: Loop, data: DataConfig, fence: Fence) -> Verdict | None:
    """Let the first process say how the run went. The others do not wait for it."""
    if not loop.config.engine.report or not loop.accelerator.is_main_process:
        return None
    try:
        from ..verdict import conclude  # here: no step needs plots
    except ImportError as error:
        logger.warning("the run is finished, and no verdict can be written: %s", error)
        return None
    return conclude(loop, data, fence)


def _keep_index(found: Sequence[Found], index: Path, fence: Fence) -> None:
    """Keep the lists of images for the next start, which can do without them."""
    try:
        with fence.guard():
            keep_index(found, index)
    except WriteFailedError as error:
        logger.warning("%s", error)


def _signal(signals: StopSignals, group: dist.ProcessGroup | None) -> int | None:
    """Return the signal that a process received before there was anything to save."""
    return max(filter(None, gather(signals.received, group)), default=None)


def _unbegun(config: RunConfig, state: TrainingState | None, signal: int | None) -> RunResult:
    """Return the result of a run that was stopped before its first step."""
    done = 0 if state is None else position_of(state).step
    return RunResult({}, config.output_dir, done, False, signal)


@contextmanager
def _fence(config: RunConfig, accelerator: Accelerator, group: dist.ProcessGroup | None) -> Iterator[Fence]:
    """Take over the run folder from any other job that may still write into it. The first process writes."""
    refuse_existing(config.output_dir, config.engine.resume)
    if config.engine.resume == "never":
        accelerator.wait_for_everyone()  # before the first process makes the folder
    fence = Fence(config.output_dir)
    with fence.held():
        error: GraftError | None = None
        if accelerator.is_main_process:
            try:
                fence.take()
                _states(config, fence).take_over()
            except GraftError as failure:
                error = failure
        raise_together(error, group)
        yield fence


def _states(config: RunConfig, fence: Fence) -> StateFolder:
    return StateFolder(config.output_dir / "checkpoints", fence.token, fence.guard)


def _find_state(config: RunConfig, fence: Fence, group: dist.ProcessGroup | None) -> TrainingState | None:
    """Return the state to resume from, which the first process reads; to the others, its outline."""
    if config.engine.resume == "never":
        return None
    state = read_once(_states(config, fence).load, group, _outline)
    if state is not None:
        check_same_run(state.meta, config)
    return state


def _outline(state: TrainingState | None) -> TrainingState | None:
    return None if state is None else state.outline()


def _prepare(
    config: RunConfig,
    accelerator: Accelerator,
    group: dist.ProcessGroup | None,
    parts: Parts,
    fence: Fence,
    batch: GlobalBatch,
) -> tuple[RunState, Schedule]:
    """Wrap the task for its processes, and create the optimizer, the average and the run state."""
    schedule = batch.schedule(config, accelerator.num_processes)
    parts.train_loader.batches_per_epoch = schedule.accum * schedule.steps_per_epoch
    n_parameters = sum(p.numel() for p in parts.task.parameters() if p.requires_grad)
    model = _wrap(config, accelerator, parts, group)
    optimizer = create_optimizer(parts.task, parts.task.layered, config.optim, schedule.peak)
    average = None if config.optim.ema is None else WeightAverage(parts.task.trainable, config.optim.ema)
    run_state = RunState(
        config=config,
        accelerator=accelerator,
        group=group,
        folder=_states(config, fence),
        task=parts.task,
        plan=parts.plan,
        model=model,
        optimizer=accelerator.prepare_optimizer(optimizer),
        average=average,
        meters={kind: Meters(accelerator.device) for kind in ("interval", "epoch")},
        log=RunLog(config.output_dir / "log.jsonl", fence.guard),
        batch=batch,
        origins=parts.origins,
        n_parameters=n_parameters,
    )
    return run_state, schedule


def _wrap(
    config: RunConfig, accelerator: Accelerator, parts: Parts, group: dist.ProcessGroup | None
) -> nn.Module:
    """Return the task on its device, compiled if requested, sharded or replicated."""
    shard_teachers(config, parts, accelerator, group)  # block by block, before a whole teacher would move
    for teacher in parts.teachers.values():
        receive(teacher.model, group, accelerator.device)
    task: nn.Module = parts.task.to(accelerator.device)  # moves the teacher, too
    if config.student.compile:
        task.compile(fullgraph=True)
    if config.engine.fsdp:
        mesh = student_mesh(config.engine, accelerator, group, accelerator.device.type)
        shard(task, parts.task.shard_units, mesh)
    elif accelerator.num_processes > 1:
        leave_to_us(parts.task)
        task = accelerator.prepare_model(task)
    return task


@contextmanager
def _recorder(
    config: RunConfig,
    parts: Parts,
    accelerator: Accelerator,
    log: RunLog,
    position: Position,
    schedule: Schedule,
    *,
    shown: bool,
    several: bool,
) -> Iterator[Recorder]:
    """Write the configuration, cut the log to `position`, and create trackers and progress bar, if it is `shown`."""
    main = accelerator.is_main_process
    trackers = []
    if main:
        _write_config(config, parts)
        log.keep(position.records)
        trackers = create_trackers(config.engine.trackers, config.output_dir, position.run_id, position.step)
    shown = shown and main and config.engine.progress
    with ProgressBar(schedule.total_steps, shown=shown, done=position.step) as bar:
        recorder = Recorder(log, trackers, bar, writes=main, name=config.output_dir.name if several else None)
        try:
            yield recorder
        finally:
            recorder.finish()
            log.close()


def _write_config(config: RunConfig, parts: Parts) -> None:
    """Write `config.yaml` in the run folder, with the teacher's commit. Raise WriteFailedError."""
    resolved = settings(config)
    if parts.origins["teacher"] is not None:
        resolved["teacher"]["revision"] = parts.origins["teacher"]["revision"]
    for name, origin in parts.origins.get("teachers", {}).items():
        resolved["teachers"][name]["revision"] = origin["revision"]
    write_text(config.output_dir / "config.yaml", write_yaml(resolved))


def _start(loop: Loop, state: TrainingState | None) -> None:
    """Restore `state`; without a state, log what starts."""
    position, accelerator = loop.position, loop.accelerator
    if state is None:
        _begin(loop)
        return
    loop.run_state.restore(state)
    choice = loop.parts.choice
    if position.best is not None and choice is not None and choice.key != position.best_metric:
        position.best = None  # a value of another metric, which this run does not measure
    if accelerator.is_main_process:
        done = f"resumed at step {position.step} of {loop.schedule.total_steps}"
        logger.warning("the run in %s is %s", loop.config.output_dir, "finished" if loop.finished else done)
        before, now = state.meta["world_size"], accelerator.num_processes
        if now != before and not loop.finished:
            logger.warning(
                "the run in %s %s", loop.config.output_dir, describe(loop.run_state.batch, before, now)
            )


def _begin(loop: Loop) -> None:
    """Log, at the start of a new run, the learning rate, the number of parameters and the teacher's accuracy."""
    config, schedule = loop.config, loop.schedule
    rates = {"blr": config.optim.blr, "peak_lr": schedule.peak, "effective_batch": schedule.effective_batch}
    blr = f"blr {config.optim.blr:.3g} x {schedule.effective_batch} / 256"
    logger.info(
        "lr %.3g (%s), %d steps, %d trainable parameters",
        schedule.peak,
        blr if config.optim.lr is None else "as given",
        schedule.total_steps,
        loop.run_state.n_parameters,
    )
    processes, images = loop.accelerator.num_processes, loop.run_state.batch.images
    differs = describe_batch(config.optim, config.data.batch_size, processes, images)
    if differs and loop.accelerator.is_main_process:
        logger.warning("%s", differs)
    loop.recorder.describe(hyperparameters(settings(config), **rates))
    if config.engine.evaluate_start and loop.parts.eval_loader is not None:
        run_state = loop.run_state
        metrics = score(loop.parts, run_state.average, loop.accelerator)
        loop.recorder.plain({"epoch": 0, "step": 0, **metrics})
    top1 = None
    if loop.parts.targets is not None:
        top1 = loop.parts.cached_top1
    elif config.engine.evaluate_teacher:
        top1 = teacher_top1(loop.parts, loop.accelerator)
    if top1 is not None:
        loop.position.metrics["teacher_top1"] = top1
        loop.recorder.plain({"epoch": 0, "step": 0, "teacher_top1": top1})
