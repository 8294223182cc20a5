"""From a RunConfig to what a run is made of: teacher, student, loaders and the task.

The dry run builds the same without weights: parameters that have a shape and no memory, and nothing is downloaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from timm.layers.weight_init import trunc_normal_
from timm.models import is_model, split_model_name_tag
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ...checkpoints import provenance
from ...checkpoints.architecture import check_published
from ...checkpoints.copying_students import copied_teacher
from ...checkpoints.model_folders import open_source
from ...checkpoints.preprocessing import Preprocessing
from ...checkpoints.pretrained import load_pretrained, load_weights, read_outline
from ...checkpoints.provenance import Pretrained, identify
from ...checkpoints.report import Place
from ...checkpoints.transformers_models import load_transformers
from ...checkpoints.weight_files import find_place
from ...models.attention.base import AttentionOperator
from ...models.conversion import nothing_given_up
from ...models.converted import start_fresh
from ...models.errors import ConfigError, DataError, JsonDict, UnsupportedModelError
from ...models.families import family_of, pooling_of, vit
from ...models.lora import add_lora
from ...models.small import without_memory
from ..config import SAME, DataConfig, RunConfig, TeacherConfig
from ..data.archives import is_packed
from ..data.labels import check_num_classes
from ..data.loaders import (
    AbsentTrainLoader,
    EvalLoader,
    TrainLoader,
    create_reference_loader,
)
from ..data.sampler import preserved
from ..first_checks import check_first
from ..methods.loss_terms import DEFAULT_TEACHER
from ..metrics.measure import PROBES
from ..mode_config import TEACHER
from ..target_shards import TargetRows, TargetShards, check_metric, find_shards
from .goals import Models
from .modes import Criterion, Mode, choose, classifies, goal_of, mode_of
from .optim import check_adapters, check_optimizer
from .parallel import check_layers_apart, outline_of, read_once, receive
from .runlog import check_trackers
from .students import (
    FRESH,
    StudentPlan,
    find_whole,
    input_size,
    resolve_preprocessing,
    settings_of,
    settle_student,
)
from .tasks import Task
from .weight_rows import StoredWeights, cut_parameters, fill, filling_rows

logger = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NO_COMMITS: Mapping[str, str | None] = {}
SMALL_SCALE = 0.01
"""LayerScale below this begins as good as no block."""


@dataclass
class Parts:
    """What a run is made of. The teacher is outside the task: never trained, wrapped, averaged or saved."""

    task: Task
    plan: StudentPlan
    teachers: dict[str, Pretrained]
    """Teachers that every step needs, by name."""
    loaded: Pretrained | None
    """The teacher, or the weights the student starts from; None once a run has started."""
    spec: Preprocessing
    """Preprocessing of the student's images."""
    train_loader: TrainLoader
    eval_loader: EvalLoader | None
    classified: bool
    """True if the labels of the test images can score the student's head."""
    choice: Criterion | None
    """Metric that selects the best state; None keeps the last."""
    reference_loader: EvalLoader | None
    """Labeled training images; None if the choice does not need them."""
    origins: JsonDict
    """The weights that the student learns or starts from: `teacher` and `init`, as `provenance` writes them, and
    `teachers` where there are further ones."""
    warnings: list[str]
    """Warnings of the fresh student, or of the weights it does not take over; one sentence each."""

    targets: TargetShards | None = None
    """The teachers' targets of the training images in `transfer.cache`; None without a cache."""
    rows: TargetRows | None = None
    """What reads them, once all are there."""
    cached_top1: float | None = None
    """The teacher's accuracy, of a run with `targets`."""

    @property
    def teacher(self) -> Pretrained | None:
        """The one of the section `teacher`, where every step needs it."""
        return self.teachers.get(DEFAULT_TEACHER)


def build(
    config: RunConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    commits: Mapping[str, str | None] = NO_COMMITS,
    weights: bool = True,
    group: dist.ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
) -> Parts:
    """Build a run on the CPU. The student's fresh weights depend on `config.seed` alone, not on the rank.

    Args:
        config: The run.
        rank: Of this process.
        world_size: Number of processes.
        commits: Those that the teachers were loaded at when the run began, by name, for a run that resumes.
        weights: False for a dry run: parameters are on the meta device, published weights are not downloaded, and the
            training set may be absent where the settings say its number of classes.
        group: Of all processes, whose first one reads all weights. The others' teachers have none until `receive`.
        mesh: Of the processes, each of which makes its rows of the student alone; None where each makes all of it.

    Raises ConfigError, CheckpointError, DataError or TransferError, one sentence each.
    """
    mode = mode_of(config)
    check_settings(mode)
    _check_data(mode, weights=weights)  # before a teacher is downloaded
    torch.manual_seed(config.seed)
    mapped = mesh is not None
    idle = mapped and not config.facts.taught  # no step runs the teacher
    whole = read_once(lambda: find_whole(config.student, mapped=mapped), group, _outline)
    start = read_once(lambda: find_start(mode, commits, weights=weights, mapped=idle), group, _outline)
    like = read_once(lambda: find_like(mode, start, commits, weights=weights), group, _outline)
    follows = config.follows_teacher
    config = settle(config, like)
    mode = mode_of(config)
    size = input_size(config.student, whole)[1:]
    loaded = replace(like, weights=None) if like is not None and follows else None
    teachers = read_once(
        lambda: load_teachers(mode, size, commits, loaded, weights=weights), group, outline_teachers
    )
    teacher = teachers.get(DEFAULT_TEACHER)
    spec = resolve_preprocessing(config, start or teacher, whole)
    with preserved():
        train_loader = _train_loader(mode, spec, rank, world_size, absent=not weights)
        eval_loader = _eval_loader(mode, spec, train_loader, rank, world_size)
    origin = start
    if whole is not None:
        origin = read_once(
            lambda: _open_start(mode, whole, commits, weights=weights, mapped=idle), group, _outline
        )
    head = mode.goal.head(mode.head(train_loader.head(), teachers, origin))
    mode.check_classes(teachers, head)
    plan = mode.plan(head.num_classes, teacher, spec, whole)
    plan = replace(plan, label_names=head.label_names)
    with nullcontext() if mesh is None else filling_rows():
        student, init, warnings = _student(mode, plan, origin, group, mesh, weights=weights)
        images = _calibration(mode, spec, teachers, student, group, weights=weights)
        task = mode.task(Models(student, teachers, spec, images, train_loader.head()))
    mode.freeze(task.trainable)
    check_adapters(task.trainable, config.optim)
    if config.engine.fsdp:
        check_layers_apart(task)
    taught = None if teacher is None else teacher.model
    known = not isinstance(train_loader, AbsentTrainLoader)
    choice = (
        choose(mode, head=head, loader=eval_loader, student=task.backbone, teacher=taught) if known else None
    )
    if known and choice is None and config.engine.patience is not None:
        raise ConfigError(
            "engine.patience needs evaluations with a metric, and this run has none: give a validation split and "
            "engine.metric, or leave engine.patience out"
        )
    reference = None
    if choice is not None and choice.kind in PROBES:
        reference = create_reference_loader(_data(config, weights), spec, rank=rank, world_size=world_size)
    origins = {"teacher": provenance.of_teacher(teacher), "init": init}
    further = {name: provenance.of_teacher(each) for name, each in teachers.items() if each is not teacher}
    if further:
        origins["teachers"] = further
    dual, targets = task.taught_by, None
    if dual is not None:
        if weights:
            logger.info("%s", dual.describe())
        if dual.needs_teacher and teacher is not None:
            plan = replace(plan, copying=dual.copying(copied_teacher(teacher)))
        if config.transfer.cache is not None and known:
            check_metric("" if choice is None else choice.kind)
            targets = find_shards(config, dual, teachers, spec, train_loader)
    return Parts(
        task=task,
        plan=plan,
        teachers=teachers if config.facts.taught else {},
        loaded=teacher if config.facts.taught or not weights else None,
        spec=spec,
        train_loader=train_loader,
        eval_loader=eval_loader,
        classified=classifies(head, eval_loader),
        choice=choice,
        reference_loader=reference,
        origins=origins,
        warnings=warnings,
        targets=targets,
    )


def _outline(found: Pretrained | None) -> Pretrained | None:
    """Return what another process than the first one gets of a model: all but the weights."""
    return None if found is None else replace(found, model=outline_of(found.model), weights=None)


def outline_teachers(found: dict[str, Pretrained]) -> dict[str, Pretrained]:
    """Return what another process than the first one gets of teachers: all but the weights."""
    return {name: replace(each, model=outline_of(each.model), weights=None) for name, each in found.items()}


def find_start(
    mode: Mode,
    commits: Mapping[str, str | None] = NO_COMMITS,
    *,
    weights: bool = False,
    mapped: bool = False,
) -> Pretrained | None:
    """Return the model whose weights a new student starts from: the teacher, or another one without its values.

    None for fresh weights, and for a student that is a whole model itself.

    Raises ConfigError: the student starts from a teacher, and no teacher is set. CheckpointError: it cannot be read.
    """
    student, source = mode.config.student, mode.config.starting_source
    if source is None or student.whole_name is not None:
        return None
    if source != TEACHER:
        return read_outline(source)
    return _load_own(mode, commits, weights=weights, starts=True, mapped=mapped)


def find_like(
    mode: Mode,
    start: Pretrained | None,
    commits: Mapping[str, str | None] = NO_COMMITS,
    *,
    weights: bool = False,
) -> Pretrained | None:
    """Return the model that the student is built as: `start`, whose weights it has, or its teacher for `model=same`.

    Raises ConfigError: no teacher is set. CheckpointError: it cannot be read.
    """
    if mode.config.student.model != SAME or mode.config.starting_source == TEACHER:
        return start
    return _load_own(mode, commits, weights=weights, starts=False)


def _load_own(
    mode: Mode, commits: Mapping[str, str | None], *, weights: bool, starts: bool, mapped: bool = False
) -> Pretrained:
    """Return the teacher at the size that the student is given, else at its own; in its file if `mapped`."""
    student, how = mode.config.student, mode.config.teacher
    if how.source is None:
        setting = f"model={SAME}" if student.model == SAME else f"init={TEACHER}"
        raise ConfigError(f"student.{setting} needs a teacher: set teacher.source")
    size = student.img_size or student.model_args.get("img_size")
    how = mode.goal.fitted(how)
    return load_teacher(
        how, size, commits.get(DEFAULT_TEACHER), weights=weights, starts=starts, mapped=mapped
    )


def _open_start(
    mode: Mode, whole: Pretrained, commits: Mapping[str, str | None], *, weights: bool, mapped: bool
) -> Pretrained | None:
    """Return the model whose weights a student starts from that is a whole model itself; None for fresh weights."""
    source, how = mode.config.starting_source, mode.config.teacher
    if source == TEACHER:
        return load_teacher(
            how, None, commits.get(DEFAULT_TEACHER), weights=weights, starts=True, mapped=mapped
        )
    return whole if source in (None, mode.config.student.whole_name) else read_outline(source)


def settled(config: RunConfig) -> RunConfig:
    """Return the settings of a run as `build` settles them, without its weights. Raises GraftError as `find_like`."""
    mode = mode_of(config)
    return settle(config, find_like(mode, find_start(mode)))


def settle(config: RunConfig, like: Pretrained | None) -> RunConfig:
    """Return the settings with the architecture, size and pooling of the model `like` where the user gave none."""
    same = config.student.model == SAME
    student = settle_student(config.student, FRESH if like is None else settings_of(like, same=same))
    if is_model(split_model_name_tag(student.model)[0]):
        arguments = {**goal_of(config).arguments(student.model), **student.model_args}
        student = student.model_copy(update={"model_args": arguments})
    return config.model_copy(update={"student": student})


def check_settings(mode: Mode) -> None:
    """Raise ConfigError for settings that no run can have, before anything is read."""
    check_first(mode.config)
    mode.check()
    mode.goal.check()
    check_optimizer(mode.config.optim)
    check_trackers(mode.config.engine.trackers)


def _data(config: RunConfig, weights: bool) -> DataConfig:
    """Return the data as it is opened: a dry run downloads none, and starts no loader processes."""
    return config.data if weights else config.data.model_copy(update={"download": False, "workers": 0})


def _train_loader(
    mode: Mode, spec: Preprocessing, rank: int, world_size: int, *, absent: bool
) -> TrainLoader:
    """Return the training set; where it may be `absent` and is, what stands in for it."""
    config = mode.config
    data, labels = _data(config, weights=not absent), config.needs_labels
    try:
        loader = mode.goal.train_loader(data, spec, rank=rank, world_size=world_size, labels=labels)
    except DataError as error:
        if not absent or not _may_be_absent(mode):
            raise
        return AbsentTrainLoader(data, error)
    check_num_classes(data, loader.class_names)  # without labels too: a later stage may learn from them
    return loader


def _check_data(mode: Mode, *, weights: bool) -> None:
    try:
        mode.goal.check_data(mode.config.data)
    except DataError:
        if weights or not _may_be_absent(mode):
            raise


def _may_be_absent(mode: Mode) -> bool:
    """Return whether the run can be described without its training set, which only the machine that it will have may
    hold."""
    data = mode.config.data
    if data.dataset == "digits" or (data.num_classes is None and mode.config.needs_labels):
        return False
    here = data.data_path is not None and Path(data.data_path).exists()
    return not here or data.download or is_packed(data)


def _eval_loader(
    mode: Mode, spec: Preprocessing, train: TrainLoader, rank: int, world_size: int
) -> EvalLoader | None:
    if not mode.config.evaluates or isinstance(train, AbsentTrainLoader):
        return None
    data = mode.config.data.model_copy(update={"num_classes": train.num_classes or None})
    return mode.goal.eval_loader(data, spec, rank=rank, world_size=world_size)


def load_teachers(
    mode: Mode,
    size: tuple[int, int],
    commits: Mapping[str, str | None] = NO_COMMITS,
    loaded: Pretrained | None = None,
    *,
    weights: bool,
) -> dict[str, Pretrained]:
    """Return the teachers by name, the one of the section `teacher` first, which may be `loaded` already."""
    config = mode.config
    reads = config.reads_teacher and config.teacher.source is not None
    found = {DEFAULT_TEACHER: config.teacher} if reads else {}
    if config.facts.transfers:
        found |= config.teachers
    return {
        name: loaded
        if loaded is not None and how is config.teacher
        else load_teacher(mode.goal.fitted(how), size, commits.get(name), weights=weights)
        for name, how in found.items()
    }


def load_teacher(
    how: TeacherConfig,
    size: int | tuple[int, int] | None,
    commit: str | None = None,
    *,
    weights: bool = True,
    starts: bool = False,
    mapped: bool = False,
) -> Pretrained:
    """Load a teacher for students of images of `size`; for None at its own. `starts`: a student starts from it, too.

    If `mapped`, or sharded, its weights stay in their file.

    Raises CheckpointError.
    """
    known, key = _known.get({}), (how.model_dump_json(), size, commit, weights, starts, mapped)
    if key in known:
        return known[key]
    source = open_source(str(how.source), commit or how.revision)
    check_published(source.found, how.model_args)
    of_timm = {"model": how.model, "model_args": how.model_args}
    teacher = load_transformers(source, how.img_size, of_timm) or load_pretrained(
        source,
        model=how.model,
        model_args=how.model_args,
        img_size=how.image_size(size),
        position_embedding=how.position_embedding,
        identified=True,
        download=weights,
        keep=starts,
        mapped=(how.shard or mapped) and weights,
    )
    if not teacher.report.places:
        teacher.model.to(DTYPES[how.dtype])
    known[key] = teacher
    return teacher


_known: ContextVar[dict[object, Pretrained]] = ContextVar("_known")


@contextmanager
def one_teacher() -> Iterator[None]:
    """Let the runs that are built within the block share the model of each teacher."""
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def identify_teachers(*configs: RunConfig) -> list[str]:
    """Return the digests of the identities of all teachers of some runs, each once. Raises CheckpointError."""
    sections = [how for config in configs for how in (config.teacher, *config.teachers.values())]
    named = {how.model_dump_json(): how for how in sections if how.source is not None}
    return [identify(load_teacher(how, None)) for how in named.values()]


def _student(
    mode: Mode,
    plan: StudentPlan,
    start: Pretrained | None,
    group: dist.ProcessGroup | None,
    mesh: DeviceMesh | None,
    *,
    weights: bool,
) -> tuple[nn.Module, JsonDict | None, list[str]]:
    """Return the student with its starting weights, where these are from, and what of them it does not take over."""
    config = mode.config
    student = _create(plan, config.student.drop_path, mesh, weights=weights)
    note = nothing_given_up(student, config.student.without)
    if note:
        logger.warning("student.%s", note)
    if config.needs_labels and pooling_of(student) == "":
        raise ConfigError(
            "student.global_pool='' keeps all tokens apart, and labels need one prediction an image: "
            "use avg, token or map"
        )
    if config.student.pos_embed_std is not None:
        position = getattr(student, "pos_embed", None)
        if not isinstance(position, nn.Parameter):
            raise ConfigError(f"student.pos_embed_std: {plan.architecture} has no learned position embedding")
        trunc_normal_(position, std=config.student.pos_embed_std)
    mode.start_head(student)
    init, warnings = _started(mode, student, start, group, mesh, weights=weights)
    if config.optim.lora is not None:
        add_lora(student, config.optim.lora)
    if config.student.grad_checkpointing:
        _recompute(student)
    return student, init, warnings


def _create(plan: StudentPlan, drop_path: float, mesh: DeviceMesh | None, *, weights: bool) -> nn.Module:
    """Create the student: on the meta device, whole, or with this process's rows of its parameters alone."""
    if not weights:
        with without_memory():
            return plan.create(drop_path)
    if mesh is not None:
        generator = torch.get_rng_state()
        try:
            with cut_parameters(mesh):
                return plan.create(drop_path)
        except ConfigError as error:
            torch.set_rng_state(generator)
            logger.info(
                "the student's constructor computes with its parameters, so they are whole: %s", error
            )
    return plan.create(drop_path)


def _recompute(student: nn.Module) -> None:
    """Let the student recompute its activations; raise ConfigError for a family of timm that cannot."""
    try:
        vit(student).set_grad_checkpointing(True)
    except AssertionError as error:
        raise ConfigError(
            f"student.grad_checkpointing=true: timm's {type(student).__name__} cannot recompute activations: set it "
            "to false"
        ) from error


def _started(
    mode: Mode,
    student: nn.Module,
    start: Pretrained | None,
    group: dist.ProcessGroup | None,
    mesh: DeviceMesh | None,
    *,
    weights: bool,
) -> tuple[JsonDict | None, list[str]]:
    """Give a student fresh weights, or those to start from, which the first process has; return where they are from,
    and what is left out.
    """
    if start is None:
        start_fresh(student)
        _check_fitted(mode, student, student.state_dict())
        return None, _warn_of_small_scale(student)
    init, warnings, held, places = read_once(
        lambda: _start_from(mode, student, start, weights=weights), group, _outline_start
    )
    fill(student, held, StoredWeights({} if mesh is None else places, group))
    return init, warnings


def _warn_of_small_scale(student: nn.Module) -> list[str]:
    """Return a warning of fresh blocks whose LayerScale hides them from a short training."""
    parts = family_of(student).native_parts(student)
    if parts is None or parts.layer_scale is None or parts.layer_scale >= SMALL_SCALE:
        return []
    return [
        f"LayerScale begins at {parts.layer_scale:g}, so fresh blocks contribute little until it has grown: for a "
        "training of hundreds of steps set student.model_args.init_values=1.0"
    ]


Start = tuple[JsonDict, list[str], dict[str, Tensor], dict[str, Place]]


def _start_from(mode: Mode, student: nn.Module, start: Pretrained, *, weights: bool) -> Start:
    """Return where the weights to start from are from, what is left out, and the weights, with their places in files.

    They are the teacher's own or others; a dry run has none.
    """
    held: dict[str, Tensor] = {}
    report = load_weights(
        student,
        start.source if start.weights is None else start.weights,
        position_embedding=mode.config.teacher.position_embedding,
        replanned=mode.config.student.plan is not None,
        take=held.update,
    )
    _check_fitted(mode, student, report.missing)
    logger.info("student starts from %s: %s", start.source, report)
    for warning in report.warnings() if weights else ():
        logger.warning("student: %s", warning)
    places = {name: place for name, each in held.items() if (place := find_place(each)) is not None}
    return provenance.of_weights(start.source, report), report.warnings(), held, places


def _outline_start(found: Start) -> Start:
    init, warnings, held, places = found
    return init, warnings, {name: each.to("meta") for name, each in held.items()}, places


def _check_fitted(mode: Mode, student: nn.Module, fresh: Collection[str]) -> None:
    """Raise UnsupportedModelError if the run would not fit an operator that must be, and whose tensors are `fresh`."""
    fresh_modules = {key.rpartition(".")[0] for key in fresh}
    for name, module in student.named_modules() if not mode.config.student.calibrate else ():
        if isinstance(module, AttentionOperator) and module.not_fitted and name in fresh_modules:
            raise UnsupportedModelError(module.not_fitted)


def _calibration(
    mode: Mode,
    spec: Preprocessing,
    teachers: Mapping[str, Pretrained],
    student: nn.Module,
    group: dist.ProcessGroup | None,
    *,
    weights: bool,
) -> Callable[[], Tensor | None]:
    """Return the first images of the first process, on every process: all must match the same heads.

    The teachers, which are to be matched on them, have their weights then.
    """

    def first_images() -> Tensor | None:
        if not weights:
            return None
        for teacher in teachers.values():
            receive(teacher.model, group)
        with preserved():
            return mode.goal.first_images(mode.config.data, spec, student)

    return first_images
