"""From a RunConfig to what a run is made of: teacher, student, loaders and the task."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from ...checkpoints import provenance
from ...checkpoints.copying import copied_teacher
from ...checkpoints.preprocessing import Preprocessing
from ...checkpoints.teacher import Teacher, load_teacher, load_weights
from ...models.copying.input import Normalization, TeacherInput
from ...models.copying.operators import COPY_METHODS
from ...models.errors import ConfigError
from ...models.lora import add_lora
from ...models.mae import MaskedAutoencoder
from ..config import RunConfig, StudentConfig
from ..data.datasets import check_dataset
from ..data.loaders import (
    EvalLoader,
    TrainLoader,
    create_eval_loader,
    create_reference_loader,
    create_train_loader,
    find_eval_loader,
)
from ..methods.dual import build_dual
from ..methods.plan import LAYER_METHODS
from ..metrics.measure import PROBES
from ..recovery.align import Alignment
from .best import Choice, choose, classifies
from .labels import check_teacher_classes, freeze_for, needs_labels, starting_source, student_head
from .randomness import preserved
from .students import (
    StudentPlan,
    find_whole,
    find_whole_name,
    input_size,
    plan_student,
    resolve_preprocessing,
)
from .tasks import AlignTask, ClassificationTask, PretrainTask, Task, TransferTask

logger = logging.getLogger(__name__)

TAUGHT = ("transfer", "align")
"""Modes that need their teacher in every step."""
HEAD_STD = 2e-5
"""Deviation of a fresh head in fine-tuning, as MAE's recipe has it."""


@dataclass
class Parts:
    """What a run is made of. The teacher is outside the task: never trained, wrapped, averaged or saved."""

    task: Task
    plan: StudentPlan
    teacher: Teacher | None
    train_loader: TrainLoader
    eval_loader: EvalLoader | None
    classified: bool
    """Whether the student's head can be scored by the labels of the test images."""
    choice: Choice | None
    """What picks the best state; None where the last one is."""
    reference_loader: EvalLoader | None
    """The labelled training images, where the choice needs them."""
    origins: dict[str, Any]
    """The weights that the student learns or starts from: `teacher` and `init`, as `provenance` writes them."""


def build(config: RunConfig, *, rank: int = 0, world_size: int = 1, commit: str | None = None) -> Parts:
    """Builds a run on the CPU. The student's fresh weights depend on `config.seed` alone, not on the rank.

    `commit` is the one that the teacher was loaded at when the run began, for a run that goes on.

    Raises ConfigError, CheckpointError, DataError or TransferError, one sentence each.
    """
    check_recomputation(config)
    check_dataset(config.data)  # before a teacher is downloaded
    torch.manual_seed(config.seed)
    whole = find_whole(config.student)
    teacher = find_teacher(config, input_size(config.student, whole)[1:], commit)
    spec = resolve_preprocessing(config, teacher, whole)
    with preserved():
        labels = needs_labels(config)
        train_loader = create_train_loader(
            config.data, spec, seed=config.seed, rank=rank, world_size=world_size, labels=labels
        )
        eval_loader = open_eval_loader(
            config, spec, train_loader.num_classes, rank=rank, world_size=world_size
        )
    head = student_head(config, train_loader.head(), teacher, whole)
    check_teacher_classes(config, teacher, head.label_names)
    classes = head.num_classes
    if config.mode == "pretrain":
        plan = plan_student(headless(config.student), classes, None, spec)
    else:
        plan = plan_student(config.student, classes, teacher, spec, whole)
    plan = replace(plan, label_names=head.label_names)
    student, init = _student(config, plan, teacher)
    task = _task(config, student, plan, teacher, spec)
    taught = None if teacher is None else teacher.model
    choice = choose(config, head=head, loader=eval_loader, student=task.backbone, teacher=taught)
    reference = None
    if choice is not None and choice.kind in PROBES:
        reference = create_reference_loader(config.data, spec, rank=rank, world_size=world_size)
    origins = {"teacher": provenance.of_teacher(teacher), "init": init}
    # Fine-tuning has taken the teacher's weights and needs it no more.
    needed = teacher if config.mode in TAUGHT else None
    if isinstance(task, TransferTask) and teacher is not None and task.dual.needs_teacher:
        plan = replace(plan, copying=task.dual.copying(copied_teacher(teacher)))
    return Parts(
        task=task,
        plan=plan,
        teacher=needed,
        train_loader=train_loader,
        eval_loader=eval_loader,
        classified=classifies(head, eval_loader),
        choice=choice,
        reference_loader=reference,
        origins=origins,
    )


def check_recomputation(config: RunConfig) -> None:
    """Raise ConfigError where torch cannot compile blocks that are run again and give losses of their own."""
    student, method = config.student, config.transfer.method
    inside = config.mode == "transfer" and method in LAYER_METHODS and method not in COPY_METHODS
    if inside and student.compile and student.grad_checkpointing:
        raise ConfigError(
            f"student.compile=true does not go with student.grad_checkpointing=true for transfer.method={method}, "
            "whose losses come from within the blocks: set one of them to false"
        )


def open_eval_loader(
    config: RunConfig, spec: Preprocessing, num_classes: int, *, rank: int = 0, world_size: int = 1
) -> EvalLoader | None:
    """The test images, labelled as the training images are; a run without labels may have none."""
    if config.data.val_split is None or (config.mode == "pretrain" and config.engine.metric == "auto"):
        return None
    data = config.data.model_copy(update={"num_classes": num_classes or None})
    if not needs_labels(config):
        return find_eval_loader(data, spec, rank=rank, world_size=world_size)
    return create_eval_loader(data, spec, rank=rank, world_size=world_size)


def find_teacher(config: RunConfig, size: tuple[int, int], commit: str | None = None) -> Teacher | None:
    """The teacher where the mode has a use for one."""
    source = config.teacher.source
    if config.mode in TAUGHT and source is None:
        raise ConfigError(
            f"mode={config.mode} needs a teacher: set teacher.source to a timm name, a hub name or a path"
        )
    starts = config.student.init is not None or find_whole_name(config.student)
    if config.mode == "finetune" and source is None and not starts:
        raise ConfigError("mode=finetune needs weights to start from: set teacher.source or student.init")
    if source is None:
        return None
    if config.mode in ("scratch", "pretrain"):
        logger.warning("teacher.source=%s is not used: mode=%s has no teacher", source, config.mode)
        return None
    return load_teacher(
        source,
        model=config.teacher.model,
        model_args=config.teacher.model_args,
        img_size=config.teacher.image_size(size),
        position_embedding=config.teacher.position_embedding,
        revision=commit or config.teacher.revision,
        identified=True,
    )


def headless(config: StudentConfig) -> StudentConfig:
    """The encoder of an autoencoder: it ends in `norm`, which timm does not build for average pooling."""
    pool = "token" if config.model_args.get("class_token", True) else ""
    return config.model_copy(update={"global_pool": pool})


def _student(
    config: RunConfig, plan: StudentPlan, teacher: Teacher | None
) -> tuple[nn.Module, dict[str, Any] | None]:
    """The student with its starting weights, and where these are from."""
    student = plan.create(config.student.drop_path)
    if config.student.pos_embed_std is not None:
        position = getattr(student, "pos_embed", None)
        if not isinstance(position, Tensor):
            raise ConfigError(f"student.pos_embed_std: {plan.architecture} has no learned position embedding")
        trunc_normal_(cast(nn.Parameter, position), std=config.student.pos_embed_std)
    if config.mode == "finetune" and hasattr(student, "get_classifier"):
        head = cast(Any, student).get_classifier()
        if isinstance(head, nn.Linear):
            trunc_normal_(head.weight, std=HEAD_STD)
    init = _start_from(config, student, teacher)
    if config.optim.lora is not None:
        add_lora(student, config.optim.lora)
    if config.student.grad_checkpointing:
        cast(Any, student).set_grad_checkpointing(True)
    return student, init


def _start_from(config: RunConfig, student: nn.Module, teacher: Teacher | None) -> dict[str, Any] | None:
    """Loads the weights to start from, the teacher's own or others, and says where they are from."""
    source = starting_source(config)
    if source is None:
        return None
    revision = None
    if source == "teacher":
        source = config.teacher.source
        if source is None:
            raise ConfigError("student.init=teacher needs a teacher: set teacher.source")
        revision = teacher.revision if teacher is not None else config.teacher.revision
    report = load_weights(
        student, source, position_embedding=config.teacher.position_embedding, revision=revision
    )
    logger.info("student starts from %s: %s", source, report)
    return provenance.of_weights(source, report)


def _calibration(config: RunConfig, spec: Preprocessing) -> Tensor:
    """The first images of the first process, on every process: all must match the same heads."""
    with preserved():
        return next(create_train_loader(config.data, spec, seed=config.seed, labels=False).epoch(0))[0]


def align_task(config: RunConfig, teacher: Teacher, student: nn.Module, spec: Preprocessing) -> AlignTask:
    """The student's converted layers beside the teacher's, on the images that the teacher wants."""
    norms = Normalization(teacher.mean, teacher.std), Normalization(spec.mean, spec.std)
    teacher_input = TeacherInput(teacher.model, student, *norms)
    return AlignTask(Alignment(teacher.model, student, config.align.match), teacher_input)


def _task(
    config: RunConfig, student: nn.Module, plan: StudentPlan, teacher: Teacher | None, spec: Preprocessing
) -> Task:
    if config.mode == "pretrain":
        settings = config.pretrain.model_dump()
        task: Task = PretrainTask(MaskedAutoencoder(student, **settings))
    elif config.mode == "align" and teacher is not None:
        task = align_task(config, teacher, student, spec)
    elif config.mode == "transfer" and teacher is not None:
        calibration = _calibration(config, spec) if config.transfer.heads == "match" else None
        normalization = Normalization(spec.mean, spec.std)
        dual = build_dual(config.transfer, teacher, student, normalization, calibration)
        logger.info("%s", dual.describe())
        task = TransferTask(dual, config.data.smoothing, config.transfer.task_weight)
    else:
        task = ClassificationTask(student, config.data.smoothing)
    freeze_for(config, task.trainable)
    return task
