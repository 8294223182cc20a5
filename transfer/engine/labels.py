"""Runs that learn without labels: what they need of the data, and which head their student has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from ...checkpoints.class_names import comparable, difference
from ...checkpoints.teacher import Head, Teacher, find_head
from ...models.copying.operators import COPY_METHODS
from ...models.errors import ConfigError, TransferError
from ..config import RunConfig
from .optim import freeze, freeze_head
from .students import find_whole_name


def needs_labels(config: RunConfig) -> bool:
    """Whether the run learns from labels; one that does not takes any images, and may have no validation split."""
    if config.mode == "transfer":
        return config.transfer.task_weight != 0
    return config.mode not in ("align", "pretrain")


def starting_source(config: RunConfig) -> str | None:
    """The weights that the student starts from: a source, or `teacher` for the teacher's own; None for fresh ones."""
    source = config.student.init or find_whole_name(config.student)
    return "teacher" if source is None and config.mode in ("finetune", "align") else source


def student_head(config: RunConfig, data: Head, teacher: Teacher | None, whole: Teacher | None) -> Head:
    """The student's head: that of the data set where it learns from labels.

    Without labels a head that comes with the weights stays as it is, and a fresh one would stay random, so there is
    none. `logits` is the exception, whose head learns the teacher's classes.
    """
    if needs_labels(config):
        return data
    if config.mode == "pretrain":
        return Head()
    source = starting_source(config)
    if whole is not None and source == config.student.model:
        return _head_of(whole)
    if config.mode == "transfer" and config.transfer.method == "logits":
        return _head_of(teacher)
    if source is None:
        return Head()
    return _head_of(teacher) if source == "teacher" else find_head(source)


def _head_of(model: Teacher | None) -> Head:
    if model is None or not model.has_head:
        return Head()
    return Head(int(cast(Any, model.model).num_classes), model.label_names)


def check_teacher_classes(config: RunConfig, teacher: Teacher | None, names: Sequence[str] | None) -> None:
    """TransferError where `logits` would teach classes under the numbers of others."""
    if teacher is None or config.mode != "transfer" or config.transfer.method != "logits":
        return
    taught = teacher.label_names
    if taught is None or names is None or not comparable(taught, names) or list(taught) == list(names):
        return
    raise TransferError(
        "transfer.method=logits needs a teacher with the classes of the data set in the same order, and the two have "
        f"{difference(taught, names)}: choose another teacher or method, or transfer.task_weight=0"
    )


def freeze_for(config: RunConfig, trainable: nn.Module) -> None:
    """Leaves to learn what `optim.trainable` names and a loss reaches.

    Raises ConfigError: the expression is not valid, or nothing would be left to learn from.
    """
    from_teacher = config.mode == "transfer" and not needs_labels(config)
    if from_teacher and config.transfer.method in COPY_METHODS:
        raise ConfigError(
            f"transfer.task_weight=0 leaves nothing to learn: transfer.method={config.transfer.method} has no loss "
            "of its own"
        )
    freeze(trainable, config.optim.trainable, keep_head=config.mode != "align")
    if from_teacher and config.transfer.method != "logits":
        freeze_head(trainable)  # nothing reaches it
