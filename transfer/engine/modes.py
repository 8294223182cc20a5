"""The train modes: transfer, align, finetune, scratch and pretrain.

A mode is one class, and a row of `MODE_FACTS`. Nothing else compares names of modes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from timm.layers.weight_init import trunc_normal_
from torch import nn

from ...checkpoints.class_names import Head, comparable, difference, same_classes
from ...checkpoints.preprocessing import Preprocessing
from ...checkpoints.provenance import Pretrained
from ...models.conversion import converted_layers
from ...models.copying.teacher_view import Normalization, TeacherInput
from ...models.errors import ConfigError, TransferError
from ...models.families import SUPPORTED, classifier_of, family_named, find_family, vit
from ...models.mae import MaskedAutoencoder
from ..align import Alignment
from ..config import Metric, RunConfig
from ..data.loaders import EvalLoader
from ..first_checks import check_teacher_given
from ..methods.dual import build_dual
from ..methods.loss_terms import term_methods
from ..methods.method import TransferMethod
from ..metrics.measure import PROBES, Family
from ..target_shards import check_cache
from .goals import Goal, Models
from .optim import freeze, freeze_head
from .students import (
    StudentPlan,
    check_compiles,
    check_something_to_learn,
    check_teachers,
    plan_student,
    teacher_settings,
    teachers_of_terms,
)
from .tasks import PretrainTask, Task

# What a train mode is: what it needs of teacher and data, and what a step computes.


def goal_of(config: RunConfig) -> Goal:
    """Return the goal of a run, with its settings."""
    if config.dense.head is None:
        return Goal(config)
    from .dense_tasks import Dense  # here: a classifier needs no detector of torchvision

    return Dense(config)


class Mode(ABC):
    """A way to train the student of a run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.goal = goal_of(config)

    def check(self) -> None:
        """Raise ConfigError for settings that do not go together, before anything is read."""
        return

    def head(self, data: Head, teachers: Mapping[str, Pretrained], start: Pretrained | None) -> Head:
        """Return the student's classifier: that of the data set where it learns from labels.

        Without labels a head that comes with the weights stays as it is. A fresh one would stay random, so the student
        has no head. `start` is the model whose weights the student starts from.
        """
        return data if self.config.needs_labels else head_of(start)

    def check_classes(self, teachers: Mapping[str, Pretrained], head: Head) -> None:
        """Raise TransferError where a teacher would teach classes under the numbers of others."""
        return

    def plan(
        self, classes: int, teacher: Pretrained | None, spec: Preprocessing, whole: Pretrained | None
    ) -> StudentPlan:
        """Return how the student is made."""
        return plan_student(self.config.student, classes, teacher, spec, whole)

    def start_head(self, student: nn.Module) -> None:
        """Draw the fresh head where the mode has a way of its own."""
        return

    @abstractmethod
    def task(self, models: Models) -> Task:
        """Return what a step computes."""

    def freeze(self, trainable: nn.Module) -> None:
        """Leave to learn what `optim.trainable` names and a loss reaches.

        Raises ConfigError: the expression is not valid, or matches nothing.
        """
        freeze(trainable, self.config.optim.trainable, keep_head=self.config.facts.keeps_head)

    def default_metric(self, classified: bool) -> Metric:
        """Return what picks the best state for `engine.metric=auto`; auto for the last state.

        `classified` says whether the student's head can be scored by the labels of the test images.
        """
        return "top1" if classified else "auto"


def head_of(model: Pretrained | None) -> Head:
    """Return the head that a model came with."""
    if model is None or not model.has_head:
        return Head()
    return Head(vit(model.model).num_classes, model.label_names)


HEAD_STD = 2e-5
"""Deviation of a fresh head in fine-tuning, as MAE's recipe has it."""


class Scratch(Mode):
    """Supervised training of fresh weights."""

    def task(self, models: Models) -> Task:
        return self.goal.supervised(models)


class Finetune(Scratch):
    """Supervised training from the teacher's weights, or from others."""

    def start_head(self, student: nn.Module) -> None:
        head = classifier_of(student)
        if isinstance(head, nn.Linear):
            trunc_normal_(head.weight, std=HEAD_STD)


class Transfer(Mode):
    """Learning from a frozen teacher's attention, features or classes, and from labels."""

    @property
    def methods(self) -> list[TransferMethod]:
        """What is taken from the teachers, by entry of `transfer.losses`."""
        return term_methods(self.config.transfer)

    @property
    def teachers_of_terms(self) -> list[str]:
        """The name of the teacher of each entry."""
        return teachers_of_terms(self.config)

    def check(self) -> None:
        check_teachers(self.config)
        check_teacher_given(self.config)
        student = self.config.student
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
        if self.config.copies and self.config.teacher.dtype != "fp32":
            raise ConfigError(
                f"teacher.dtype={self.config.teacher.dtype} does not go with transfer.method={self.methods[0].name}, "
                "whose student is saved with its teacher in float32: set it to fp32"
            )
        check_something_to_learn(self.config)

    @property
    def teaches_classes(self) -> list[str]:
        """The names of the teachers whose classes the student's head learns."""
        found = zip(self.methods, self.teachers_of_terms, strict=True)
        return [name for method, name in found if method.teaches_classes]

    def head(self, data: Head, teachers: Mapping[str, Pretrained], start: Pretrained | None) -> Head:
        whole = self.config.student.whole_name
        own = whole is not None and self.config.starting_source == whole
        if self.teaches_classes and not self.config.needs_labels and not own:
            return head_of(teachers.get(self.teaches_classes[0]))
        return super().head(data, teachers, start)

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
        return self.goal.taught(models, dual)

    def freeze(self, trainable: nn.Module) -> None:
        super().freeze(trainable)
        if not self.config.needs_labels and not self.teaches_classes:
            freeze_head(trainable)  # nothing reaches it

    def default_metric(self, classified: bool) -> Metric:
        if classified:
            return "top1"
        return "distance" if any(method.nears_features for method in self.methods) else "loss"


class Align(Mode):
    """Each converted layer learns on its teacher's inputs, without labels."""

    def check(self) -> None:
        if self.config.teacher.dtype != "fp32":
            raise ConfigError(
                f"teacher.dtype={self.config.teacher.dtype} does not go with mode=align, whose layers learn from the "
                "teacher's in float32: set it to fp32"
            )

    def task(self, models: Models) -> Task:
        teacher, student = models.taught_by(), models.student
        norms = Normalization(teacher.mean, teacher.std), models.normalization
        alignment = Alignment(teacher.model, student, self.config.align.match)
        return self.goal.aligned(models, alignment, TeacherInput(teacher.model, student, *norms))

    def default_metric(self, classified: bool) -> Metric:
        return "top1" if classified else "distance"


class Pretrain(Mode):
    """Masked autoencoding, without labels and without a teacher."""

    def head(self, data: Head, teachers: Mapping[str, Pretrained], start: Pretrained | None) -> Head:
        return Head()

    def plan(
        self, classes: int, teacher: Pretrained | None, spec: Preprocessing, whole: Pretrained | None
    ) -> StudentPlan:
        """Return the encoder: it ends in `norm`, which timm does not build for average pooling."""
        student = self.config.student
        _refuse_stages(student.model, whole)
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


def _refuse_stages(model: str, whole: Pretrained | None) -> None:
    family = family_named(model) if whole is None else find_family(whole.model)
    if family is not None and "masking" in family.cannot:
        raise ConfigError(
            f"mode=pretrain: student.model={model} {family.cannot['masking']}: masked autoencoding shows the encoder "
            f"a part of the tokens; supported are {SUPPORTED}"
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


# The metric that selects the best state of a run.

Kind = Family | Literal["objective", "goal"]


@dataclass(frozen=True)
class Criterion:
    """A metric of an evaluation, `test_<key>` in the log."""

    key: str
    kind: Kind
    """The measurement; `objective` is the run's own loss on the test images, `goal` what its goal measures."""

    @property
    def smaller(self) -> bool:
        """Return whether smaller values are better."""
        return self.key in ("loss", "objective", "relative_error")

    def describe(self) -> str:
        """Describe the best state in words."""
        return f"the state with the {'smallest' if self.smaller else 'largest'} test_{self.key}"

    def better(self, value: float, best: float | None) -> bool:
        """Return whether `value` is better than `best`. The first value (`best` is None) always is."""
        return best is None or (value < best if self.smaller else value > best)


CRITERIA: dict[Metric, Criterion] = {
    "top1": Criterion("top1", "top1"),
    "knn": Criterion("knn_top1", "knn"),
    "probe": Criterion("probe_top1", "probe"),
}


def classifies(head: Head, loader: EvalLoader | None) -> bool:
    """Return whether the labels of these images are the head's classes, in any order."""
    if loader is None or not 0 < head.num_classes == loader.num_classes:
        return False
    return same_classes(head.label_names, loader.class_names)


def choose(
    mode: Mode,
    *,
    head: Head,
    loader: EvalLoader | None,
    student: nn.Module,
    teacher: nn.Module | None,
) -> Criterion | None:
    """Return the metric that `engine.metric` selects; None without evaluation (the last state is then the best).

    `head` is the student's head, `loader` has the test images.

    Raises ConfigError: this run cannot measure the metric.
    """
    classified = classifies(head, loader)
    config = mode.config
    metric = config.engine.metric
    if mode.goal.measures:
        if metric != "auto":
            raise ConfigError(
                f"engine.metric={metric} is of classifiers, and dense.head has its own: leave it out"
            )
        return None if loader is None or mode.goal.best is None else Criterion(mode.goal.best, "goal")
    if metric == "auto":
        metric = mode.default_metric(classified)
        if loader is None or metric == "auto":
            return None
    if loader is None:
        raise ConfigError(
            f"engine.metric={metric} needs test images: give a validation split, or set it to auto"
        )
    if metric == "top1" and not classified:
        raise ConfigError(
            "engine.metric=top1 needs labels and a head of as many classes; use knn, probe, distance or loss"
        )
    if metric in PROBES and not loader.num_classes:
        raise ConfigError(
            f"engine.metric={metric} needs labels, and the test images have none; use distance or loss"
        )
    if metric == "distance" and not config.facts.taught:
        raise ConfigError(
            f"engine.metric=distance needs a teacher, and mode={config.mode} has none; use loss or knn"
        )
    if metric == "distance":
        same_width = teacher is not None and _width(teacher) == _width(student)
        return Criterion("relative_error" if same_width else "cka", "distance")
    if metric == "loss":
        return Criterion("loss", "top1") if config.needs_labels else Criterion("objective", "objective")
    return CRITERIA[metric]


def _width(model: nn.Module) -> int:
    """Return the width of the head's input."""
    return int(getattr(model, "head_hidden_size", None) or vit(model).num_features)
