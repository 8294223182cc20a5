"""Features after the last block, pulled to the teacher's: the pooled one before the head, the patches', or both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.attention.kernels import precise
from ...models.copying.tape import Tape
from ...models.copying.teacher_view import Wanted
from ...models.errors import Json, TransferError
from ...models.families import family_of
from ...models.parts import feature_width, num_classes, patch_width
from ..loss_config import LossConfig
from .method import Installed, Pairing, TransferMethod, TransferPlan
from .standardize import Measured, Standardizer
from .taught_layer import Changes

# Patches of a student and of any teacher on one grid, so that their features can be compared.

Grid = tuple[int, int]
"""Rows and columns."""


def student_patches(student: nn.Module, tokens_BNC: Tensor, images: Grid) -> Tensor:
    """Return the patches after the final norm, of a pyramid those of its last stage, as (B, rows, columns, C).

    Raises TransferError: the student dropped patches.
    """
    family = family_of(student)
    geometry = family.last_geometry(student, images)
    if tokens_BNC.dim() == 3 and tokens_BNC.shape[1] != geometry.num_tokens:
        rows, columns = geometry.grid
        raise TransferError(
            f"transfer.tokens=patches needs all {rows}x{columns} patches of the student, and it has "
            f"{tokens_BNC.shape[1] - geometry.num_prefix}: set student.model_args.patch_drop_rate to 0"
        )
    return family.patches(tokens_BNC, geometry)


def teacher_patches(patches: Tensor, student: Grid) -> Tensor:
    """Return a teacher's patches as (B, rows, columns, C).

    A teacher that gives (B, N, C) does not say how its patches lie: they are taken to lie as the student's.

    Raises TransferError: it has another number of patches.
    """
    if patches.dim() == 4:
        return patches
    if patches.shape[1] != student[0] * student[1]:
        raise TransferError(
            f"the teacher gives {patches.shape[1]} patches without their grid, and the student has "
            f"{student[0]}x{student[1]}: use another teacher, img_size that makes them equal, or tokens=pooled"
        )
    return patches.unflatten(1, student)


def common_grid(one: Grid, other: Grid) -> Grid:
    """Return the coarser of two grids, side by side."""
    return min(one[0], other[0]), min(one[1], other[1])


def average_to(patches_BhwC: Tensor, grid: Grid) -> Tensor:
    """Return the patches averaged over the area of each cell of a coarser `grid`, in float32.

    Two small matrix products: their backward pass is deterministic on every device.
    """
    patches = precise(patches_BhwC)
    rows, columns = patches.shape[1:3]
    with torch.autocast(patches.device.type, enabled=False):
        if rows != grid[0]:
            patches = torch.einsum("ah,nhwc->nawc", _overlap(rows, grid[0], patches), patches)
        if columns != grid[1]:
            patches = torch.einsum("bw,nhwc->nhbc", _overlap(columns, grid[1], patches), patches)
    return patches


def _overlap(fine: int, coarse: int, like: Tensor) -> Tensor:
    """Return how much of each of `coarse` cells each of `fine` cells of the same length fills (coarse, fine)."""
    edges = torch.arange(fine, dtype=like.dtype, device=like.device)
    lows = torch.arange(coarse, dtype=like.dtype, device=like.device)[:, None] * (fine / coarse)
    shared = torch.minimum(edges + 1, lows + fine / coarse) - torch.maximum(edges, lows)
    return shared.clamp(min=0) * (coarse / fine)


# The features of a student and of a teacher that are compared: the pooled ones, and those of the patches.

HEADS = ("head", "head_dist")
PREDICTION = "prediction"
"""The name of the student's prediction on the tape."""


@dataclass(eq=False)
class FeaturePart(ABC):
    """One kind of features of both models, as a step leaves them on the tape."""

    student: nn.Module
    teacher: nn.Module
    tape: Tape
    loss_name: ClassVar[str]
    """The name of its loss, and of the modules that learn with it."""
    words: ClassVar[str]

    @property
    @abstractmethod
    def widths(self) -> tuple[int, int]:
        """The widths of student and teacher."""

    @abstractmethod
    def record(self, changes: Changes) -> None:
        """Keep what the student gives on the tape, by hooks that are added to `changes`."""

    @abstractmethod
    def of_student(self) -> Tensor:
        """Return the student's features (B, ..., C)."""

    @abstractmethod
    def of_teacher(self, images: tuple[int, int]) -> Tensor:
        """Return the teacher's features (B, ..., C) in float32, for images of a size for the student."""


class Pooled(FeaturePart):
    """What goes into the head. DeiT's two heads read two tokens, and their mean is the feature."""

    loss_name = "feature"
    words = "the pooled features before the head"
    predicts = False
    """Whether the student has no head, and its prediction are its pooled features."""

    @property
    def widths(self) -> tuple[int, int]:
        return feature_width(self.student), feature_width(self.teacher)

    def record(self, changes: Changes) -> None:
        heads = family_of(self.student).classifiers(self.student)
        if not heads and num_classes(self.student):
            raise TransferError(
                f"transfer.tokens: the head of the student, a {type(self.student).__name__}, is not one layer after "
                "its pooled features: use tokens=patches, or logits"
            )
        for name, head in heads.items():
            changes.hooks.append(head.register_forward_pre_hook(_KeepInput(self.tape, name)))
        self.predicts = not heads

    def of_student(self) -> Tensor:
        if self.predicts:
            return self.tape.features[PREDICTION]
        inputs = [self.tape.features[name] for name in HEADS if name in self.tape.features]
        if not inputs:
            raise _not_seen("head")
        return torch.stack(inputs).mean(0)

    def of_teacher(self, images: tuple[int, int]) -> Tensor:
        return precise(self.tape.whole["pooled"])


class Patches(FeaturePart):
    """The patches after the final norm; of two grids the finer one is averaged to the coarser one."""

    loss_name = "patches"
    words = "the features of the patches after the final norm"

    @property
    def widths(self) -> tuple[int, int]:
        return patch_width(self.student), patch_width(self.teacher)

    def record(self, changes: Changes) -> None:
        family = family_of(self.student)
        changes.hooks.append(family.watch_tokens(self.student, _Keep(self.tape, "tokens")))

    def of_student(self) -> Tensor:
        tokens, size = self.tape.features.get("tokens"), image_size_of(self.tape)
        if tokens is None:
            raise _not_seen("final norm")
        patches = student_patches(self.student, family_of(self.student).tokens(tokens), size)
        theirs = teacher_patches(self.tape.whole["patches"], self._grid(size))
        return average_to(patches, self._common(size, theirs))

    def of_teacher(self, images: tuple[int, int]) -> Tensor:
        patches = teacher_patches(self.tape.whole["patches"], self._grid(images))
        return average_to(patches, self._common(images, patches))

    def _grid(self, images: tuple[int, int]) -> tuple[int, int]:
        return family_of(self.student).geometries(self.student, images)[-1].grid

    def _common(self, images: tuple[int, int], theirs: Tensor) -> tuple[int, int]:
        return common_grid(self._grid(images), (theirs.shape[1], theirs.shape[2]))


PARTS: dict[str, tuple[type[FeaturePart], ...]] = {
    "pooled": (Pooled,),
    "patches": (Patches,),
    "both": (Pooled, Patches),
}
"""By the value of `transfer.tokens`."""


def image_size_of(tape: Tape) -> tuple[int, int]:
    """Return height and width of the student's images in this step."""
    images = tape.features["images"]
    return int(images.shape[-2]), int(images.shape[-1])


@dataclass(eq=False)
class _Keep:
    """Keeps an output of the student."""

    tape: Tape
    name: str

    def __call__(self, out: Tensor) -> None:
        if self.tape.active:
            self.tape.features[self.name] = out


@dataclass(eq=False)
class _KeepInput:
    """A hook before a module of the student: its input is kept."""

    tape: Tape
    name: str

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.tape.active:
            self.tape.features[self.name] = inputs[0]


def _not_seen(part: str) -> TransferError:
    return TransferError(
        f"the student's {part} was not seen to run: it was compiled before it was taught, or replaced; wrap the "
        "plain model, and compile the DualViT"
    )


RESULTS = {"feature": "pooled", "patches": "patches"}
"""By the name of each loss, the result of the whole teacher that it reads."""
STANDARDIZED = {
    "dimension": ", each dimension of the teacher's standardized",
    "phi_s": ", the teacher's standardized by PHI-S",
}


class Feature(TransferMethod):
    """The distance of what goes into the head, of the patches, or the sum of both."""

    name = "feature"
    words = "{feature_loss} between "
    uses_layers = False
    nears_features = True

    def wanted(self, plan: TransferPlan) -> Wanted:
        return Wanted(whole=frozenset(RESULTS[part.loss_name] for part in PARTS[plan.tokens]))

    def loss_names(self, settings: LossConfig) -> tuple[str, ...]:
        return tuple(part.loss_name for part in PARTS[settings.tokens])

    def describe(self, settings: Json) -> str:
        parts = PARTS.get(str(settings.get("tokens")), PARTS["pooled"])
        how = STANDARDIZED.get(str(settings.get("standardize")), "")
        return super().describe(settings) + " and ".join(part.words for part in parts) + how

    def install(self, pairing: Pairing) -> Installed:
        config, installed, losses = pairing.config, Installed(), []
        for kind in PARTS[config.tokens]:
            part = kind(pairing.student, pairing.teacher, pairing.tape)
            part.record(pairing.changes)
            student, teacher = part.widths
            if teacher == 0:
                raise TransferError(f"the teacher does not give {part.words}: use other tokens, or logits")
            standardizer = None
            if config.standardize != "none":
                standardizer = Standardizer(config.standardize, teacher)
                installed.projectors[f"{part.loss_name}_statistics"] = standardizer
                installed.measured.append(Measured(standardizer, config.standardize_images, part.of_teacher))
            if student != teacher or standardizer is not None:
                installed.projectors[part.loss_name] = nn.Linear(student, teacher)
            losses.append(_FeatureLoss(part, config.feature_loss, installed.projectors))
        installed.finish = _Losses(losses)
        return installed


@dataclass(eq=False)
class _FeatureLoss:
    part: FeaturePart
    loss: str
    projectors: nn.ModuleDict

    def __call__(self) -> Tensor:
        student, name = self.part.of_student(), self.part.loss_name
        if name in self.projectors:
            student = self.projectors[name](student)
        student, teacher = precise(student), self.part.of_teacher(image_size_of(self.part.tape))
        if f"{name}_statistics" in self.projectors:
            teacher = self.projectors[f"{name}_statistics"](teacher)
        if self.loss == "smooth_l1":
            return F.smooth_l1_loss(student, teacher)
        if self.loss == "mse":
            return F.mse_loss(student, teacher)
        return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


@dataclass(eq=False)
class _Losses:
    losses: Sequence[_FeatureLoss]

    def __call__(self, logits: Tensor) -> dict[str, Tensor]:
        for loss in self.losses:
            loss.part.tape.features[PREDICTION] = logits
        return {loss.part.loss_name: loss() for loss in self.losses}


METHODS = (Feature(),)
