"""Which image size and patch grid teacher and student have for a batch, and whether these grids go together.

A model with `dynamic_img_size` has another grid for each image size, so what counts is the batch, and neither the size
that the model was built for nor the number of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ..errors import TransferError, UnsupportedModelError
from ..families import SUPPORTED, fills, patch_grid

Size = tuple[int, int]
"""Height and width."""


class Grids(NamedTuple):
    """The patch grids of one batch."""

    teacher: Size
    student: Size


@dataclass(frozen=True)
class GridRule:
    """Which grids a method takes."""

    copy: bool
    """Whether it takes equal grids only, because it copies or compares patch by patch."""
    interpolate: bool = False
    """Whether it interpolates the teacher's attention logits where grids differ."""
    relative_bias: bool = False
    """Whether the teacher has a relative position bias, which cannot be interpolated."""

    def check(self, teacher: Size, student: Size, batch: Size | None = None) -> list[str]:
        """Return what is done about unequal grids, in sentences; those of images of size `batch`, or of the models'
        own.

        Raises `TransferError` for grids that do not go together.
        """
        if teacher == student:
            return []
        grids = f"the teacher's patch grid is {words(teacher)} and the student's {words(student)}"
        agree = "set teacher.img_size (or student.img_size) so that"
        if batch is not None:
            grids = f"for images of {words(batch)}, {grids}"
            agree = "feed images of the student's own size, or build both models with dynamic_img_size=true so that"
        if self.copy:
            raise TransferError(
                f"{grids}, and attention can be copied only between equal grids; {agree} both models have the same "
                "number of patches a side"
            )
        if not self.interpolate:
            raise TransferError(
                f"{grids}; {agree} they agree, or transfer.interpolate_grid=true to interpolate the teacher's "
                "attention logits"
            )
        if self.relative_bias:
            raise TransferError(
                f"{grids}, and transfer.interpolate_grid cannot interpolate a teacher's relative position bias; "
                f"{agree} they agree"
            )
        return [f"{grids}: the teacher's queries and keys are interpolated, and so its attention logits"]


class Embeddings:
    """The patch embeddings of a teacher and a student, as they are at each call: a model may be resized."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        for model in (teacher, student):
            if not hasattr(model, "patch_embed"):
                raise UnsupportedModelError(
                    f"{type(model).__name__} has no patch embedding for the whole model; supported are {SUPPORTED}"
                )
        self._embeddings: Any = (teacher.patch_embed, student.patch_embed)

    def grids(self, images: Size) -> Grids:
        """Return the grids of images of this size for the student. Raises `TransferError`: a model does not take
        them."""
        teacher, student = self._embeddings
        own = _take(student, "student", images)
        return Grids(_take(teacher, "teacher", self.teacher_size(images)), own)

    def teacher_size(self, images: Size) -> Size:
        """Return the size at which the teacher sees images of this size for the student.

        At the student's own size it is the teacher's own. At another size, a teacher that takes any size gets as many
        more patches as the student, so that equal grids stay equal; a teacher of a single size keeps its own.
        """
        teacher, student = self._embeddings
        if images == own_size(student) or teacher.strict_img_size:
            return own_size(teacher)
        theirs, ours = patch_grid(teacher, own_size(teacher)), patch_grid(student, own_size(student))
        height, width = (
            max(1, (2 * t * n + s) // (2 * s))  # t n / s, rounded
            for t, s, n in zip(theirs, ours, patch_grid(student, images), strict=True)
        )
        patch = teacher.patch_size
        return height * int(patch[0]), width * int(patch[1])

    @property
    def own_sizes(self) -> tuple[Size, Size]:
        """The image sizes that teacher and student were built for."""
        teacher, student = self._embeddings
        return own_size(teacher), own_size(student)


def own_size(embedding: Any) -> Size:
    """Height and width of the images that a model was built for."""
    height, width = embedding.img_size
    return int(height), int(width)


def words(size: Size) -> str:
    """Return a size or a grid as it is written."""
    return f"{size[0]}x{size[1]}"


def _take(embedding: Any, name: str, images: Size) -> Size:
    """Return the grid of images of this size; TransferError where the model does not take them."""
    own, patch = own_size(embedding), embedding.patch_size
    if embedding.strict_img_size and images != own:
        raise TransferError(
            f"the images are {words(images)} and the {name} takes {words(own)} alone; resize them, set "
            f"{name}.img_size, or build it with {name}.model_args.dynamic_img_size=true"
        )
    grid = patch_grid(embedding, images)
    if min(grid) < 1 or not fills(embedding, images):
        raise TransferError(
            f"images of {words(images)} are not whole patches of {words(patch)}, as the {name} needs them: "
            f"set {name}.img_size to whole patches, such as {words(_whole(images, patch))}"
        )
    return grid


def _whole(images: Size, patch: Size) -> Size:
    height, width = (max(1, round(side / step)) * step for side, step in zip(images, patch, strict=True))
    return height, width
