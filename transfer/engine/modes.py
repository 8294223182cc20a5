"""The train modes: transfer, align, finetune, scratch and pretrain.

A mode is one class. Nothing else compares names of modes.
"""

from __future__ import annotations

from collections.abc import Mapping

from timm.layers.weight_init import trunc_normal_
from torch import nn

from ...checkpoints.class_names import comparable, difference
from ...checkpoints.preprocessing import Preprocessing
from ...checkpoints.pretrained import Head, Pretrained
from ...models.conversion import converted_layers
from ...models.copying.teacher_view import Normalization
from ...models.errors import ConfigError, TransferError
from ...models.families import SUPPORTED, classifier_of, family_named, find_family
from ...models.mae import MaskedAutoencoder
from ..cache.cache_checks import check_cache
from ..config import AlignConfig, Metric, PretrainConfig, RunConfig, TransferConfig
from ..methods.configured_dual import build_dual
from ..methods.loss_terms import term_methods
from ..methods.method import TransferMethod
from ..recovery.align import Alignment
from ..recovery.alike import shown_to
from .mode import TEACHER, Mode, Models, head_of
from .optim import freeze_head
from .students import StudentPlan, find_whole_name, plan_student
from .tasks import AlignTask, ClassificationTask, PretrainTask, Task, TransferTask
from .teacher_checks import (
    check_compiles,
    check_something_to_learn,
    check_teachers,
    teacher_settings,
    teachers_of_terms,
)

HEAD_STD = 2e-5
"""Deviation of a fresh head in fine-tuning, as MAE's recipe has it."""


class Scratch(Mode):
    """Supervised training of fresh weights."""

    @property
    def reads_teacher(self) -> bool:
        return False

    def task(self, models: Models) -> Task:
        return ClassificationTask(models.student, self.config.data.smoothing)


class Finetune(Scratch):
    """Supervised training from the teacher's weights, or from others."""

    starts_from = TEACHER
    draws_head = True

    @property
    def reads_teacher(self) -> bool:
        return self.config.student.init in (None, TEACHER) or self.config.student.mirror_teacher

    def check(self) -> None:
        named = self.config.student.init is not None or find_whole_name(self.config.student)
        if self.config.teacher.source is None and not named:
            raise ConfigError(
                f"mode={self.config.mode} needs weights to start from: set teacher.source or student.init"
            )

    def start_head(self, student: nn.Module) -> None:
        head = classifier_of(student)
        if isinstance(head, nn.Linear):
            trunc_normal_(head.weight, std=HEAD_STD)


class Transfer(Mode):
    """Learning from a frozen teacher's attention, features or classes, and from labels."""

    taught = True
    prepares_teacher = True
    reads = frozenset({"teachers", *(f"transfer.{name}" for name in TransferConfig.model_fields)})

    @property
    def methods(self) -> list[TransferMethod]:
        """What is taken from the teachers, by entry of `transfer.losses`."""
        return term_methods(self.config.transfer)

    @property
    def copies(self) -> bool:
        return any(method.copies for method in self.methods)

    @property
    def teachers_of_terms(self) -> list[str]:
        """The name of the teacher of each entry."""
        return teachers_of_terms(self.config)

    def check(self) -> None:
        check_teachers(self.config)
        super().check()
        student, losses = self.config.student, self.config.transfer.losses
        for index, (method, term) in enumerate(zip(self.methods, self.config.transfer.terms, strict=True)):
            method.check_read(term, f"transfer.losses[{index}]" if losses else "transfer")
        check_cache(self.config, self.methods)
        for method in self.methods:
            if method.loss_within_blocks and student.compile and student.grad_checkpointing:
                raise ConfigError(
                    "student.compile=true does not go with student.grad_checkpointing=true for "
                    f"transfer.method={method.name}, whose losses come from within the blocks: set one of them to "
                    "false"
                )
        for name, teacher in teacher_settings(self.config).items():
            if teacher.compile and student.compile:
                raise ConfigError(
                    f"{name}.compile=true changes nothing beside student.compile=true, which compiles the whole step: "
                    "set one of them to false"
                )
        if self.copies and self.config.teacher.dtype != "fp32":
            raise ConfigError(
                f"teacher.dtype={self.config.teacher.dtype} does not go with transfer.method={self.methods[0].name}, "
                "whose student is saved with its teacher in float32: set it to fp32"
            )
        check_something_to_learn(self.config)

    @property
    def needs_labels(self) -> bool:
        return self.config.transfer.task_weight != 0

    @property
    def skips_parameters(self) -> bool:
        return self.copies

    @property
    def teaches_classes(self) -> list[str]:
        """The names of the teachers whose classes the student's head learns."""
        found = zip(self.methods, self.teachers_of_terms, strict=True)
        return [name for method, name in found if method.teaches_classes]

    def head(self, data: Head, teachers: Mapping[str, Pretrained], whole: Pretrained | None) -> Head:
        own = whole is not None and self.starting_source == self.config.student.model
        if self.teaches_classes and not self.needs_labels and not own:
            return head_of(teachers.get(self.teaches_classes[0]))
        return super().head(data, teachers, whole)

    def check_classes(self, teachers: Mapping[str, Pretrained], head: Head) -> None:
        names = head.label_names
        for method, name in zip(self.methods, self.teachers_of_terms, strict=True):
            taught = teachers[name].label_names if method.teaches_classes else None
            if taught is None or names is None:
                continue
            if comparable(taught, names) and list(taught) != list(names):
                raise TransferError(
                    f"transfer.method={method.name} needs a teacher with the classes of the data set in the same "
                    f"order, and the two have {difference(taught, names)}: choose another teacher or method, or "
                    "transfer.task_weight=0"
                )

    def task(self, models: Models) -> Task:
        config = self.config.transfer
        matches = any(each.heads == "match" for each in config.terms)
        images = models.calibration() if matches else None
        models.taught_by()
        check_compiles(self.config, models.teachers)
        dual = build_dual(config, models.teachers, models.student, models.normalization, images)
        dual.compile_teachers([name for name, each in teacher_settings(self.config).items() if each.compile])
        return TransferTask(dual, self.config.data.smoothing, config.task_weight)

    def freeze(self, trainable: nn.Module) -> None:
        super().freeze(trainable)
        if not self.needs_labels and not self.teaches_classes:
            freeze_head(trainable)  # nothing reaches it

    def default_metric(self, classified: bool) -> Metric:
        if classified:
            return "top1"
        return "distance" if any(method.nears_features for method in self.methods) else "loss"


class Align(Mode):
    """Each converted layer learns on its teacher's inputs, without labels."""

    taught = True
    starts_from = TEACHER
    keeps_head = False
    aligns = True
    runs_blocks = False
    reads = frozenset(f"align.{name}" for name in AlignConfig.model_fields)

    @property
    def needs_labels(self) -> bool:
        return False

    def task(self, models: Models) -> Task:
        teacher, student = models.taught_by(), models.student
        norms = Normalization(teacher.mean, teacher.std), models.normalization
        alignment = Alignment(teacher.model, student, self.config.align.match)
        return AlignTask(alignment, shown_to(teacher.model, student, *norms))

    def default_metric(self, classified: bool) -> Metric:
        return "top1" if classified else "distance"


class Pretrain(Mode):
    """Masked autoencoding, without labels and without a teacher."""

    classifies = False
    pools = False
    reads = frozenset(f"pretrain.{name}" for name in PretrainConfig.model_fields)

    @property
    def reads_teacher(self) -> bool:
        return False

    @property
    def needs_labels(self) -> bool:
        return False

    @property
    def evaluates(self) -> bool:
        return super().evaluates and self.config.engine.metric != "auto"

    def head(self, data: Head, teachers: Mapping[str, Pretrained], whole: Pretrained | None) -> Head:
        return Head()

    def plan(
        self, classes: int, teacher: Pretrained | None, spec: Preprocessing, whole: Pretrained | None
    ) -> StudentPlan:
        """Return the encoder: it ends in `norm`, which timm does not build for average pooling."""
        student = self.config.student
        _refuse_pyramid(student.model, whole)
        pool = "token" if student.model_args.get("class_token", True) else ""
        return plan_student(student.model_copy(update={"global_pool": pool}), classes, None, spec)

    def task(self, models: Models) -> Task:
        for index, layer in converted_layers(models.student).items():
            traits = layer.operator.traits
            if traits.needs_grid or traits.resolution != "free":
                raise ConfigError(
                    f"mode={self.config.mode} shows its encoder a part of the tokens, and {layer.choice} of layer "
                    f"{index} needs all of them: leave it out of student.plan, or convert the encoder afterwards"
                )
        return PretrainTask(MaskedAutoencoder(models.student, **self.config.pretrain.model_dump()))


def _refuse_pyramid(model: str, whole: Pretrained | None) -> None:
    family = family_named(model) if whole is None else find_family(whole.model)
    if family is not None and family.is_pyramid:
        raise ConfigError(
            f"mode=pretrain: student.model={model} is a pyramid, and masked autoencoding shows the encoder a part of "
            f"the tokens; supported are {SUPPORTED}"
        )


MODES: dict[str, type[Mode]] = {
    "transfer": Transfer,
    "align": Align,
    "finetune": Finetune,
    "scratch": Scratch,
    "pretrain": Pretrain,
}
"""By the value of `mode`."""


def mode_of(config: RunConfig) -> Mode:
    """Return the mode of a run, with its settings."""
    return MODES[config.mode](config)
