"""The train modes: transfer, align, finetune, scratch and pretrain.

A mode is one class, and a row of `MODE_FACTS`. Nothing else compares names of modes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from ...checkpoints.class_names import Head, comparable, difference
from ...checkpoints.preprocessing import Preprocessing
from ...checkpoints.provenance import Pretrained
from ...models.conversion import converted_layers
from ...models.copying.teacher_view import Normalization, ShownImages, TeacherInput
from ...models.errors import ConfigError, TransferError
from ...models.families import SUPPORTED, blocks_of, classifier_of, family_named, find_family, vit
from ...models.mae import MaskedAutoencoder
from ..align import Alignment
from ..config import Metric, RunConfig
from ..first_checks import check_teacher_given
from ..methods.dual import DualViT, build_dual
from ..methods.loss_terms import DEFAULT_TEACHER, term_methods
from ..methods.method import TransferMethod
from ..methods.standardize import Batch, mark_ready
from ..target_shards import check_cache
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

# What a step computes in each train mode: `task(images, targets)` gives named losses, `loss` the total.

Losses = dict[str, Tensor]


def classification_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return cross-entropy in float32, mean over the batch; logits (B, C).

    Class indices (B,) get label `smoothing`. Probabilities (B, C), from mixup, are smoothed already.
    """
    soft = targets.is_floating_point()
    return F.cross_entropy(logits.float(), targets, label_smoothing=0.0 if soft else smoothing)


def check_learns(loss: Tensor) -> None:
    """Raise ConfigError for a loss that no trained parameter changes."""
    if not loss.requires_grad:
        raise ConfigError(
            "no trained parameter changes the loss: let optim.trainable name parameters before the layers that learn "
            "(transfer.layers), or set transfer.task_weight above 0"
        )


class Task(nn.Module, ABC):
    """A train mode. Its children hold all that learns; a teacher is never one of them."""

    @property
    @abstractmethod
    def trainable(self) -> nn.Module:
        """The model that is trained, averaged and saved as the result."""

    @property
    def saved(self) -> nn.Module:
        """The module whose state dict is the weights of the run, under names that start with `student.`."""
        return self

    @property
    def backbone(self) -> nn.Module:
        """The model whose features count: the one that leaves the run."""
        return self.trainable

    teacher_input: ShownImages | None
    """Images as the teacher sees them; None without a teacher."""

    @property
    def shard_units(self) -> Sequence[nn.Module]:
        """The modules that FSDP shards one by one."""
        return blocks_of(self.trainable)

    def measure(self, batches: Iterable[Batch]) -> None:
        """Measure on training images what a new run needs before its first step."""
        return

    def measured(self) -> None:
        """Note that what `measure` gives is there: from a state, or for a rehearsal without values."""
        return

    @abstractmethod
    def forward(self, images: Tensor, targets: Tensor) -> Losses:
        """Return losses of images (B, C, H, W) with class indices (B,) or probabilities (B, classes)."""

    def weighted(self, losses: Losses) -> Losses:
        """Return by name the terms, with their weights, that add up to the `loss` of a step; none of a single loss."""
        return {}

    def predict(self, images: Tensor) -> Tensor:
        """Return logits (B, classes), or features (B, D) of a student without a head."""
        logits: Tensor = self.trainable(images)
        return logits


class ClassificationTask(Task):
    """Supervised training of the student alone: fine-tuning, or from scratch."""

    def __init__(self, student: nn.Module, smoothing: float) -> None:
        super().__init__()
        self.student = student
        self.smoothing = smoothing
        self.teacher_input = None

    @property
    def trainable(self) -> nn.Module:
        return self.student

    def forward(self, images: Tensor, targets: Tensor) -> Losses:
        return {"loss": classification_loss(self.student(images), targets, self.smoothing)}


class TransferTask(Task):
    """Classification plus the transfer loss of a teacher; a copying method runs through the teacher."""

    def __init__(self, dual: DualViT, smoothing: float, task_weight: float = 1.0) -> None:
        super().__init__()
        self.dual = dual
        self.smoothing = smoothing
        self.task_weight = task_weight

    @property
    def teacher_input(self) -> ShownImages:  # type: ignore[override]
        return self.dual.teacher_input

    @property
    def trainable(self) -> nn.Module:
        return self.dual.student

    @property
    def saved(self) -> nn.Module:
        return self.dual

    def forward(self, images: Tensor, targets: Tensor, *taught: Mapping[str, Tensor]) -> Losses:
        """Return losses of images; with `taught`, which the teachers gave for them before, no teacher runs."""
        output = self.dual(images, *taught)
        if self.task_weight == 0:
            return {"loss": output.transfer_loss, **output.parts}
        task = self.task_weight * classification_loss(output.logits, targets, self.smoothing)
        losses = {"loss": task + output.transfer_loss, "task": task}
        if output.parts:  # a copying method has no transfer loss
            losses = {**losses, "transfer": output.transfer_loss, **output.parts}
        return losses

    def weighted(self, losses: Losses) -> Losses:
        """Return `task`, the classification loss, and each entry of `transfer.losses` by its label.

        A single transfer loss is called by its method.
        """
        terms = {name: loss for name, loss in losses.items() if name == "task"}
        for term in self.dual.terms:
            if term.label in losses:
                terms[term.label] = term.settings.weight * losses[term.label]
            elif not term.label and not term.method.copies:
                terms[term.settings.method] = losses["transfer" if "task" in losses else "loss"]
        return terms

    def measure(self, batches: Iterable[Batch]) -> None:
        self.dual.standardize(batches)

    def measured(self) -> None:
        mark_ready(self.dual)

    def predict(self, images: Tensor) -> Tensor:
        return self.dual.predict(images)


class AlignTask(Task):
    """Each converted layer learns on its teacher's inputs; labels are not looked at."""

    teacher_input: ShownImages

    def __init__(self, alignment: Alignment, teacher_input: ShownImages) -> None:
        super().__init__()
        self.alignment = alignment
        self.teacher_input = teacher_input
        alignment.freeze_others()

    @property
    def trainable(self) -> nn.Module:
        return self.alignment.student

    @property
    def saved(self) -> nn.Module:
        return self.alignment

    def forward(self, images: Tensor, targets: Tensor) -> Losses:
        losses = self.alignment(self.teacher_input(images))
        parts = {f"layer{layer:02d}": loss for layer, loss in losses.items()}
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}


class PretrainTask(Task):
    """Masked autoencoding without labels (MAE, arXiv:2111.06377)."""

    def __init__(self, autoencoder: MaskedAutoencoder) -> None:
        super().__init__()
        self.student = autoencoder
        self.teacher_input = None

    @property
    def trainable(self) -> nn.Module:
        return self.student

    @property
    def backbone(self) -> nn.Module:
        return self.student.encoder

    @property
    def shard_units(self) -> Sequence[nn.Module]:
        return blocks_of(self.backbone)

    def forward(self, images: Tensor, targets: Tensor) -> Losses:
        return {"loss": self.student(images)}

    def predict(self, images: Tensor) -> Tensor:
        """Return the encoder's features of whole images."""
        features: Tensor = self.backbone(images)
        return features


# What a train mode is: what it needs of teacher and data, and what a step computes.


@dataclass(frozen=True)
class Models:
    """The models of a run, of which its mode makes a task."""

    student: nn.Module
    teachers: Mapping[str, Pretrained]
    """Teachers by name: that of the section `teacher` under `DEFAULT_TEACHER`, and those of `teachers`."""
    spec: Preprocessing
    """Preprocessing of the student's images."""
    calibration: Callable[[], Tensor | None]
    """Function for the first images, which returns None without weights."""

    @property
    def normalization(self) -> Normalization:
        """Of the student's images."""
        return Normalization(self.spec.mean, self.spec.std)

    def taught_by(self) -> Pretrained:
        """Return the teacher of a mode that is taught, for which `Mode.check` asked."""
        if DEFAULT_TEACHER not in self.teachers:
            raise ConfigError("this mode needs a teacher: set teacher.source")
        return self.teachers[DEFAULT_TEACHER]


class Mode(ABC):
    """A way to train the student of a run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def check(self) -> None:
        """Raise ConfigError for settings that do not go together, before anything is read."""
        return

    def head(self, data: Head, teachers: Mapping[str, Pretrained], start: Pretrained | None) -> Head:
        """Return the student's head: that of the data set where it learns from labels.

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
        return ClassificationTask(models.student, self.config.data.smoothing)


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
        return TransferTask(dual, self.config.data.smoothing, config.task_weight)

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
        return AlignTask(alignment, TeacherInput(teacher.model, student, *norms))

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
