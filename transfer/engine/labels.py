"""Runs that learn without labels: what they need of the data, and which head their student has."""

from __future__ import annotations

from torch import nn

from ...checkpoints.teacher import Teacher, count_classes
from ...models.copying.operators import COPY_METHODS
from ...models.errors import ConfigError
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


def head_size(config: RunConfig, data_classes: int, teacher: Teacher | None, whole: Teacher | None) -> int:
    """The student's number of classes: those of the data set where its head learns from labels.

    Without labels a head that comes with the weights stays as it is, and a fresh one would stay random, so there is
    none: 0. `logits` is the exception, whose head learns the teacher's classes.
    """
    if needs_labels(config):
        return data_classes
    if config.mode == "pretrain":
        return 0
    source = starting_source(config)
    if whole is not None and source == config.student.model:
        return _classes_of(whole)
    if config.mode == "transfer" and config.transfer.method == "logits":
        return _classes_of(teacher)
    if source is None:
        return 0
    return _classes_of(teacher) if source == "teacher" else count_classes(source)


def _classes_of(model: Teacher | None) -> int:
    return int(model.model.num_classes) if model is not None and model.has_head else 0  # type: ignore[arg-type]


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
