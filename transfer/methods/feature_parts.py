"""The features of a student and of a teacher that are compared: the pooled ones, and those of the patches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...models.attention.kernels import precise
from ...models.copying.tape import Tape
from ...models.errors import TransferError
from ...models.families import family_of, is_pyramid, vit
from ...models.parts import feature_width, patch_width
from .lessons import Changes
from .patch_maps import average_to, common_grid, student_patches, teacher_patches

HEADS = ("head", "head_dist")


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

    @property
    def widths(self) -> tuple[int, int]:
        return feature_width(self.student), feature_width(self.teacher)

    def record(self, changes: Changes) -> None:
        for name, head in _heads(self.student).items():
            changes.hooks.append(head.register_forward_pre_hook(_KeepInput(self.tape, name)))

    def of_student(self) -> Tensor:
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
        return vit(self.student).num_features, patch_width(self.teacher)

    def record(self, changes: Changes) -> None:
        last = family_of(self.student).last_tokens(self.student)
        changes.hooks.append(last.register_forward_hook(_KeepOutput(self.tape, "tokens")))

    def of_student(self) -> Tensor:
        tokens, images = self.tape.features.get("tokens"), self.tape.features.get("images")
        if tokens is None or images is None:
            raise _not_seen("final norm")
        size = _size(images)
        patches = student_patches(self.student, tokens, size)
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


def _heads(student: nn.Module) -> dict[str, nn.Module]:
    """Return the classifiers whose inputs are the pooled features; of a pyramid the one after its own pooling."""
    found: Any = vit(student).get_classifier() if is_pyramid(student) else None
    heads = {name: student._modules.get(name) for name in HEADS} if found is None else {"head": found}
    return {name: head for name, head in heads.items() if head is not None}


def record_images(student: nn.Module, tape: Tape, changes: Changes) -> None:
    """Keep the student's images on the tape."""
    embedding = family_of(student).embedding(student)
    changes.hooks.append(embedding.register_forward_pre_hook(_KeepInput(tape, "images")))


def image_size_of(tape: Tape) -> tuple[int, int]:
    """Return height and width of the student's images in this step."""
    return _size(tape.features["images"])


def _size(images: Tensor) -> tuple[int, int]:
    return int(images.shape[-2]), int(images.shape[-1])


@dataclass(eq=False)
class _KeepInput:
    """A hook before a module of the student: its input is kept."""

    tape: Tape
    name: str

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.tape.active:
            self.tape.features[self.name] = inputs[0]


@dataclass(eq=False)
class _KeepOutput:
    """A hook of a module of the student: its output is kept."""

    tape: Tape
    name: str

    def __call__(self, module: nn.Module, inputs: object, out: Tensor) -> None:
        if self.tape.active:
            self.tape.features[self.name] = out


def _not_seen(part: str) -> TransferError:
    return TransferError(
        f"the student's {part} was not seen to run: it was compiled before it was taught, or replaced; wrap the "
        "plain model, and compile the DualViT"
    )
