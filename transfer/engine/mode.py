"""What a train mode is: what it needs of teacher and data, what its student starts from, what a step computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...checkpoints.preprocessing import Preprocessing
from ...checkpoints.pretrained import Head, Pretrained, find_head
from ...models.copying.teacher_view import Normalization
from ...models.errors import ConfigError
from ...models.families import vit
from ..config import Metric, RunConfig
from ..methods.loss_terms import DEFAULT_TEACHER
from .optim import freeze
from .students import StudentPlan, find_whole_name, plan_student
from .tasks import Task

TEACHER = "teacher"
"""As the weights to start from: those of the run's own teacher."""


@dataclass(frozen=True)
class Models:
    """The models of a run, of which its mode makes a task."""

    student: nn.Module
    teachers: Mapping[str, Pretrained]
    """By name: the one of the section `teacher` under `DEFAULT_TEACHER`, and those of `teachers`."""
    spec: Preprocessing
    """How the student's images are made."""
    calibration: Callable[[], Tensor | None]
    """Gives the first images; None without weights."""

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

    taught: ClassVar[bool] = False
    """Whether a teacher takes part in every step."""
    starts_from: ClassVar[str | None] = None
    """The weights that the student starts from where the settings name none."""
    keeps_head: ClassVar[bool] = True
    """Whether the head learns whatever `optim.trainable` says."""
    draws_head: ClassVar[bool] = False
    """Whether it draws the head after all other fresh weights, on whose number of draws it then depends."""
    aligns: ClassVar[bool] = False
    """Whether it trains converted layers alone."""
    classifies: ClassVar[bool] = True
    """Whether its student can have an accuracy."""
    runs_blocks: ClassVar[bool] = True
    """Whether a step runs the student's blocks."""
    pools: ClassVar[bool] = True
    """Whether the student is pooled as `student.global_pool` says."""
    prepares_teacher: ClassVar[bool] = False
    """Whether teachers can be compiled alone, or sharded."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """The settings that no other mode reads."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def check(self) -> None:
        """Raise ConfigError for settings that do not go together, before anything is read."""
        if self.taught and self.config.teacher.source is None:
            raise ConfigError(
                f"mode={self.config.mode} needs a teacher: set teacher.source to a timm name, a hub name or a path"
            )

    @property
    def needs_labels(self) -> bool:
        """Whether the run learns from labels; one that does not takes any images, and may have no validation split."""
        return True

    @property
    def reads_teacher(self) -> bool:
        """Whether a teacher is loaded at all, to learn from or to start from."""
        return True

    @property
    def evaluates(self) -> bool:
        """Whether the run opens the test images."""
        return self.config.data.val_split is not None

    @property
    def skips_parameters(self) -> bool:
        """Whether parameters of the student may take no part in a step, for which DDP must look."""
        return False

    @property
    def copies(self) -> bool:
        """Whether the student runs with a teacher's attention, also after the run."""
        return False

    @property
    def starting_source(self) -> str | None:
        """The weights that the student starts from: a source, or `TEACHER`; None for fresh ones."""
        return self.config.student.init or find_whole_name(self.config.student) or self.starts_from

    def head(self, data: Head, teachers: Mapping[str, Pretrained], whole: Pretrained | None) -> Head:
        """Return the student's head: that of the data set where it learns from labels.

        Without labels a head that comes with the weights stays as it is. A fresh one would stay random, so the student
        has no head. `whole` is the model that the student continues, where it is one.
        """
        if self.needs_labels:
            return data
        source = self.starting_source
        if whole is not None and source == self.config.student.model:
            return head_of(whole)
        if source is None:
            return Head()
        return head_of(teachers.get(DEFAULT_TEACHER)) if source == TEACHER else find_head(source)

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
        freeze(trainable, self.config.optim.trainable, keep_head=self.keeps_head)

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
