"""Detection and segmentation: the step of a detector or a segmenter, how it is measured, and what is written of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from typing_extensions import Unpack

from ...checkpoints.class_names import Head
from ...checkpoints.dense_models import load_dense, write_beside
from ...checkpoints.formats.containers import BODY
from ...checkpoints.preprocessing import Preprocessing
from ...checkpoints.pretrained import read_outline
from ...models.conversion import ARCHITECTURE as CONVERTED
from ...models.conversion import converted_layers
from ...models.copying.teacher_view import ShownImages
from ...models.dense import DESIGNS, Design
from ...models.dense.backbone import Maps, Prepared, any_size_arguments, divisor_of
from ...models.dense.dense_model import DenseModel, create_dense, prepare
from ...models.errors import ConfigError, JsonDict
from ..align import Alignment
from ..config import DataConfig, TeacherConfig
from ..data.dense import (
    DenseAugment,
    DenseBatch,
    DenseEvalLoader,
    DenseTrainLoader,
    create_dense_eval_loader,
    create_dense_train_loader,
)
from ..data.dense_sets import check_dense
from ..data.sampler import Ranks, preserved
from ..methods.dual import DualViT, check_teaches_parts
from ..methods.loss_terms import term_methods
from ..metrics.dense_scores import score_dense
from . import deadline
from .goals import Goal, Models
from .tasks import AlignTask, Losses, Task

logger = logging.getLogger(__name__)


class DenseTask(Task):
    """A detector or segmenter that learns from its labels, and from the teachers of its backbone where it has any.

    Teachers and backbone see the same resized, normalized and padded batch; tokens of the padding do not count in the
    losses of the teachers.
    """

    prefix, pruned = BODY, True

    def __init__(self, model: DenseModel, dual: DualViT | None = None, task_weight: float = 1.0) -> None:
        super().__init__()
        self.student = model
        self.projectors = nn.ModuleDict() if dual is None else dual.projectors
        self.task_weight = task_weight
        self._dual = (dual,)  # in a tuple, so that the backbone is registered once
        self.teacher_input = None if dual is None else dual.teacher_input

    @property
    def trainable(self) -> nn.Module:
        return self.student

    @property
    def backbone(self) -> nn.Module:
        return self.student.backbone.body

    @property
    def layered(self) -> nn.Module:
        return self.backbone

    @property
    def described(self) -> JsonDict:
        return {"dense": {"kind": self.student.kind, **self.student.settings}}

    @property
    def taught_by(self) -> DualViT | None:
        return self._dual[0]

    def train(self, mode: bool = True) -> DenseTask:
        super().train(mode)
        if self.taught_by is not None:
            self.taught_by.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DenseTask:
        super()._apply(fn, recurse)
        if self.taught_by is not None:
            self.taught_by._apply(fn)  # the teachers follow the student to a device
        return self

    def forward(self, batch: DenseBatch) -> Losses:
        """Return the losses of a batch: those of the head, their sum as `task`, and the teachers' as `transfer`."""
        prepared = self.student.prepare(batch.images, batch.targets)
        with self._taught(prepared) as lesson:
            maps = self.student.backbone(prepared.tensors)
        parts = self.student.losses(prepared, maps)
        task = self.task_weight * torch.stack(list(parts.values())).sum()
        if lesson is None:
            return {"loss": task, **parts}
        return {"loss": task + lesson.loss, "task": task, "transfer": lesson.loss, **parts, **lesson.parts}

    def _taught(self, prepared: Prepared) -> AbstractContextManager[Any]:
        return self.taught_by.teaching(prepared.tensors, prepared.sizes) if self.taught_by else nullcontext()

    def evaluate(self, loader: Any, accelerator: Accelerator) -> dict[str, float]:
        """Return average precision, or the mean intersection over union, of all processes' images."""
        how: JsonDict = {"autocast": accelerator.autocast, "gather": lambda part: gather_object([part])}
        return score_dense(self.student, watched(loader), accelerator.device, **how)

    def write_beside(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        write_beside(self.student, tensors, folder)

    def rehearsed(self, images: Tensor, targets: Tensor) -> Losses:
        """Return a stand-in for the losses of images (B, 3, H, W): the mean of the levels, without the head.

        What a head does depends on the values of boxes, which a rehearsal does not have.
        """
        prepared = Prepared(images, [(images.shape[-2], images.shape[-1])] * len(images))
        with self._taught(prepared) as lesson:
            maps: Maps = self.student.neck(self.student.backbone(images))
        loss = torch.stack([each.float().mean() for each in maps]).sum()
        return {"loss": loss if lesson is None else loss + lesson.loss}


class DenseAlignTask(AlignTask):
    """Converted layers learn on images of any size, padded to one batch."""

    def __init__(self, alignment: Alignment, shown: ShownImages, prepare: Callable[..., Prepared]) -> None:
        super().__init__(alignment, shown)
        self._prepare = prepare

    def needs(self, size: tuple[int, int]) -> object:
        return None

    def forward(self, batch: DenseBatch) -> Losses:  # type: ignore[override]
        """Return the losses of the layers, which see the padding as their teacher does."""
        return super().forward(self._prepare(batch.images).tensors, torch.empty(0))

    def rehearsed(self, images: Tensor, targets: Tensor) -> Losses:
        """Return the losses of images (B, 3, H, W)."""
        return super().forward(images, torch.empty(0))


def watched(batches: Iterable[Any]) -> Iterator[Any]:
    """Return batches, each of which shows that the process is not stuck."""
    for batch in batches:
        deadline.moved()
        yield batch


class Dense(Goal):
    """Detection and segmentation."""

    measures = True

    @property
    def best(self) -> str | None:
        return None if self.config.facts.aligns else self._design.best

    @property
    def _design(self) -> Design:
        assert self.config.dense.head is not None
        return DESIGNS[self.config.dense.head]

    def image_size(self, spec: Preprocessing, model: nn.Module) -> tuple[int, int]:
        dense = self.config.dense
        factor = dense.scale[1] if dense.scale else 1
        sides = (min(factor * side, dense.crop or math.inf) for side in (max(dense.short), dense.long))
        divisor = divisor_of(model)
        height, width = (math.ceil(side / divisor) * divisor for side in sides)
        return height, width

    def check(self) -> None:
        if not self.config.facts.classifies:
            raise ConfigError(
                f"dense.head changes nothing with mode={self.config.mode}, which learns without labels: leave it out"
            )
        if self.config.dense.head == "upernet" and self.config.data.batch_size == 1:
            raise ConfigError(
                "data.batch_size=1 has no statistics of the one token of UPerNet's pooling: give 2 or more"
            )
        for method in term_methods(self.config.transfer) if self.config.facts.transfers else ():
            check_teaches_parts(method)

    def fitted(self, how: TeacherConfig) -> TeacherConfig:
        """Return the settings of a teacher with which it takes images of any size."""
        found = read_outline(str(how.source))
        if converted_layers(found.model):
            return how
        more = any_size_arguments(found.architecture)
        return how.model_copy(update={"model_args": {**more, **found.model_args, **how.model_args, **more}})

    def arguments(self, name: str) -> JsonDict:
        return {} if name == CONVERTED else any_size_arguments(name)  # it has those of the model it was

    @property
    def _how(self) -> JsonDict:
        dense = self.config.dense
        augment = DenseAugment(**dict(dense), hflip=self.config.data.hflip)
        return {"augment": augment, "masks": self._design.has_masks}

    def check_data(self, data: DataConfig) -> None:
        task, dense = check_dense(data, (data.train_split, data.val_split)), self.config.dense
        if task != dense.task:
            raise ConfigError(
                f"dense.head={dense.head} is of {dense.task}, and data.dataset={data.dataset} of {task}: change one"
            )

    def train_loader(
        self, data: DataConfig, spec: Preprocessing, *, labels: bool = True, **ranks: Unpack[Ranks]
    ) -> DenseTrainLoader:
        return create_dense_train_loader(data, seed=self.config.seed, **self._how, **ranks)

    def eval_loader(
        self, data: DataConfig, spec: Preprocessing, **ranks: Unpack[Ranks]
    ) -> DenseEvalLoader | None:
        return None if self.best is None else create_dense_eval_loader(data, **self._how, **ranks)

    def sample(self, data: DataConfig, spec: Preprocessing, count: int, model: nn.Module) -> Tensor:
        """Return the first training images, padded to one batch."""
        plain = data.model_copy(update={"batch_size": count, "workers": 0})
        with preserved():
            batch: Any = next(self.train_loader(plain, spec).epoch(0))[0]
        return prepare(batch.images, spec.mean, spec.std, divisor_of(model)).tensors

    def first_images(self, data: DataConfig, spec: Preprocessing, model: nn.Module) -> Tensor:
        return self.sample(data, spec, data.batch_size, model)

    def head(self, found: Head) -> Head:
        return Head()

    def supervised(self, models: Models) -> Task:
        return DenseTask(self._model(models))

    def taught(self, models: Models, dual: DualViT) -> Task:
        return DenseTask(self._model(models), dual, self.config.transfer.task_weight)

    def aligned(self, models: Models, alignment: Alignment, shown: ShownImages) -> Task:
        mean, std, divisor = models.spec.mean, models.spec.std, divisor_of(models.student)
        return DenseAlignTask(alignment, shown, partial(prepare, mean=mean, std=std, divisor=divisor))

    def _model(self, models: Models) -> DenseModel:
        """Return the detector or segmenter on the student, with the neck and head of `dense.source` if it is given."""
        dense = self.config.dense
        assert dense.head is not None
        other = None if dense.source is None else load_dense(dense.source)
        if other is not None and other.kind != dense.head:
            raise ConfigError(
                f"dense.source={dense.source} is a {other.kind}, and dense.head={dense.head}: give one kind"
            )
        old: JsonDict = {} if other is None else other.settings
        model = create_dense(
            dense.head, models.student, models.classes.num_classes,
            width=dense.width or old.get("width"), norms=dense.norms or old.get("norms", ()),
            class_names=models.classes.label_names or (), mean=models.spec.mean, std=models.spec.std,
            short=max(dense.short), long=dense.long, samples=dense.samples or old.get("samples"),
            anchor_scale=dense.anchor_scale or old.get("anchor_scale"),
        )  # fmt: skip
        if other is not None:
            _take_head(model, other, f"dense.source={dense.source}")
        if dense.frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(DenseTask.prefix))
        return model


def _take_head(model: DenseModel, other: DenseModel, source: str) -> None:
    """Load the neck and the head of another detector or segmenter; a head of other classes stays fresh.

    Raises ConfigError: it is of other sizes.
    """
    parts, own = (
        {name: each for name, each in one.state_dict().items() if not name.startswith(DenseTask.prefix)}
        for one in (other, model)
    )
    both = parts.keys() & own.keys()
    fresh = [name for name in {**parts, **own} if name not in both or own[name].shape != parts[name].shape]
    for name in fresh:  # other classes are other rows
        of_classes = name in both and own[name].shape[1:] == parts[name].shape[1:]
        if other.num_classes == model.num_classes or not of_classes:
            raise ConfigError(
                f"{source} does not fit: {name} is of another size here: give it the same backbone, "
                "dense.width and dense.norms"
            )
    model.load_state_dict({name: each for name, each in parts.items() if name not in fresh}, strict=False)
    if fresh:
        logger.warning("dense.source: %s stay fresh, because the classes differ", ", ".join(fresh))
