"""What a student is to do. A goal says which images are read, what a step learns from them, and what is measured.

A goal is one class in a file of its own. Runs with a `dense.head` have `Dense`, others classify.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import Unpack

from ...checkpoints.class_names import Head
from ...checkpoints.preprocessing import Preprocessing
from ...checkpoints.provenance import Pretrained
from ...models.copying.teacher_view import Normalization, ShownImages
from ...models.errors import ConfigError, JsonDict
from ..align import Alignment
from ..config import DataConfig, RunConfig, TeacherConfig
from ..data.datasets import check_dataset
from ..data.loaders import EvalLoader, TrainLoader, create_eval_loader, create_train_loader, find_eval_loader
from ..data.sampler import Ranks
from ..data.survey import sample_images
from ..methods.dual import DualViT
from ..methods.loss_terms import DEFAULT_TEACHER
from .tasks import AlignTask, ClassificationTask, Task, TransferTask


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
    classes: Head = field(default_factory=Head)
    """The classes of the training images."""

    @property
    def normalization(self) -> Normalization:
        """Of the student's images."""
        return Normalization(self.spec.mean, self.spec.std)

    def taught_by(self) -> Pretrained:
        """Return the teacher of a mode that is taught, for which `Mode.check` asked."""
        if DEFAULT_TEACHER not in self.teachers:
            raise ConfigError("this mode needs a teacher: set teacher.source")
        return self.teachers[DEFAULT_TEACHER]


class Goal:
    """Classification, of which the other goals change what differs."""

    measures: ClassVar[bool] = False
    """Whether its tasks evaluate themselves, by numbers of their own."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def check(self) -> None:
        """Raise ConfigError for settings that do not go together, before anything is read."""
        return

    @property
    def best(self) -> str | None:
        """The number of its own that picks the best state, larger being better."""
        return None

    def fitted(self, how: TeacherConfig) -> TeacherConfig:
        """Return the settings of a teacher that sees the images of this goal."""
        return how

    def arguments(self, name: str) -> JsonDict:
        """Return the arguments of timm's constructor of `name` that a student of this goal has."""
        return {}

    def image_size(self, spec: Preprocessing, model: nn.Module) -> tuple[int, int]:
        """Return the height and width of the largest batch for a model."""
        return spec.input_size[1:]

    def check_data(self, data: DataConfig) -> None:
        """Raise a GraftError for a data set that cannot be read, before any image is."""
        check_dataset(data)

    def train_loader(
        self, data: DataConfig, spec: Preprocessing, *, labels: bool = True, **ranks: Unpack[Ranks]
    ) -> TrainLoader:
        """Return the training images. Raises as `create_train_loader`."""
        return create_train_loader(data, spec, seed=self.config.seed, labels=labels, **ranks)

    def eval_loader(self, data: DataConfig, spec: Preprocessing, **ranks: Unpack[Ranks]) -> EvalLoader | None:
        """Return the test images, labeled as the training images are; a run without labels may have none."""
        create = create_eval_loader if self.config.needs_labels else find_eval_loader
        return create(data, spec, **ranks)

    def sample(self, data: DataConfig, spec: Preprocessing, count: int, model: nn.Module) -> Tensor:
        """Return training images (count, C, H, W) to calibrate a model on, as `sample_images`."""
        return sample_images(data, spec, count, seed=self.config.seed)

    def first_images(self, data: DataConfig, spec: Preprocessing, model: nn.Module) -> Tensor:
        """Return the images (B, C, H, W) of the first batch of a run of one process."""
        return next(self.train_loader(data, spec, labels=False).epoch(0))[0]

    def head(self, found: Head) -> Head:
        """Return the student's classifier, where that of a classifier would be `found`."""
        return found

    def supervised(self, models: Models) -> Task:
        """Return the step of a student that learns from labels alone."""
        return ClassificationTask(models.student, self.config.data.smoothing)

    def taught(self, models: Models, dual: DualViT) -> Task:
        """Return the step of a student that teachers teach."""
        return TransferTask(dual, self.config.data.smoothing, self.config.transfer.task_weight)

    def aligned(self, models: Models, alignment: Alignment, shown: ShownImages) -> Task:
        """Return the step of converted layers that learn on the inputs of a teacher's."""
        return AlignTask(alignment, shown)
