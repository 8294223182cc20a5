"""What a step computes: `task(*batch)` gives named losses, `loss` the total; of classes it takes images and targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ...models.copying.tape import Step
from ...models.copying.teacher_view import ShownImages
from ...models.errors import ConfigError, JsonDict
from ...models.families import blocks_of
from ...models.mae import MaskedAutoencoder
from ..align import Alignment, LayerLesson
from ..data.loaders import EvalLoader
from ..methods.dual import DualViT
from ..methods.standardize import Batch, mark_ready

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

    prefix: ClassVar[str] = ""
    """What the names of `backbone` begin with in `trainable`."""
    pruned: ClassVar[bool] = False
    """Whether `backbone` lacks parts of the model of its plan."""

    @property
    def saved(self) -> nn.Module:
        """The module whose state dict is the weights of the run, under names that start with `student.`."""
        return self

    @property
    def backbone(self) -> nn.Module:
        """The model whose features count: the one that leaves the run."""
        return self.trainable

    @property
    def described(self) -> JsonDict:
        """What a state says of the student besides its plan."""
        return {}

    @property
    def taught_by(self) -> DualViT | None:
        """The teachers whose losses, or copies, are a part of the step."""
        return None

    @property
    def layered(self) -> nn.Module:
        """The model whose layers `optim.layer_decay` counts."""
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

    forward: Callable[..., Losses]
    """The losses of a batch: of images (B, C, H, W) with class indices (B,) or probabilities (B, classes)."""

    def needs(self, size: tuple[int, int]) -> object:
        """Return what a step on images of a height and width reads of the teachers.

        One pass of them, `teach`, serves all tasks that need the same. None: a task runs its teachers itself, if any.
        """
        return None

    def teach(self, images: Tensor) -> object:
        """Return what the teachers give for images: the last argument of `forward` of a task that needs the same."""
        return None

    def evaluate(self, loader: EvalLoader, accelerator: Accelerator) -> dict[str, float] | None:
        """Return the numbers of the test images by name; None where they are those of a classifier."""
        return None

    def rehearsed(self, images: Tensor, targets: Tensor) -> Losses:
        """Return the losses of a batch whose tensors have shapes and no values."""
        return self.forward(images, targets)

    def write_beside(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write what `trainable` has besides its backbone, with the values of `tensors`, into the student's folder."""
        return

    def weighted(self, losses: Losses) -> Losses:
        """Return by name the terms, with their weights, that add up to the `loss` of a step; none of a single loss."""
        return {}

    def predict(self, images: Tensor) -> Tensor:
        """Return logits (B, classes), or features (B, D) of a student without a head."""
        return self.trainable(images)


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
    def taught_by(self) -> DualViT:
        return self.dual

    @property
    def teacher_input(self) -> ShownImages:  # type: ignore[override]
        return self.dual.teacher_input

    @property
    def trainable(self) -> nn.Module:
        return self.dual.student

    @property
    def saved(self) -> nn.Module:
        return self.dual

    def needs(self, size: tuple[int, int]) -> object:
        return self.dual.needs(size)

    def teach(self, images: Tensor) -> dict[str, Step]:
        return self.dual.show(images)

    def forward(self, images: Tensor, targets: Tensor, *taught: Mapping[str, Tensor | Step]) -> Losses:
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

    def needs(self, size: tuple[int, int]) -> object:
        return self.alignment.layers, self.teacher_input.teacher_size(size)

    def teach(self, images: Tensor) -> dict[int, LayerLesson]:
        return self.alignment.teach(self.teacher_input(images))

    def forward(self, images: Tensor, targets: Tensor, *taught: Mapping[int, LayerLesson]) -> Losses:
        losses = self.alignment(self.teacher_input(images), *taught)
        parts = {f"layer{layer:02d}": loss for layer, loss in losses.items()}
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}


class PretrainTask(Task):
    """Masked autoencoding without labels (MAE, arXiv:2111.06377)."""

    prefix = "encoder."

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
        return self.backbone(images)
