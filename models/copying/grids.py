"""Which image size and patch grid teacher and student have for a batch, and whether these grids go together.

A model with `dynamic_img_size` has another grid for each image size, so what counts is the batch, and neither the size
that the model was built for nor the number of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..errors import TransferError, UnsupportedModelError
from ..families import SUPPORTED, family_of, fills, find_family, is_pyramid, patch_size

Size = tuple[int, int]
"""Height and width."""


class Grids(NamedTuple):
    """The patch grids of one batch, by stage; a plain vision transformer has one stage."""

    teacher: tuple[Size, ...]
    student: tuple[Size, ...]


@dataclass(frozen=True)
class GridRule:
    """Which grids a method takes."""

    copy: bool
    """Whether it takes equal grids only, because it copies or compares patch by patch."""
    interpolate: bool = False
    """Whether it interpolates the teacher's attention logits where grids differ."""
    relative_bias: bool = False
    """Whether the teacher has a relative position bias, which cannot be interpolated."""
    stages: tuple[tuple[int, int], ...] = ((0, 0),)
    """The stages of teacher and student whose grids go together."""
    method: str | None = None
    """The method that compares patch by patch, for a message; None where attention is copied."""

    def check_batch(self, grids: Grids, batch: Size) -> None:
        """Raise `TransferError` for images of size `batch` whose grids do not go together."""
        for teacher, student in self.stages:
            self.check(grids.teacher[teacher], grids.student[student], batch)

    def check(self, teacher: Size, student: Size, batch: Size | None = None) -> list[str]:
        """Return what is done about unequal grids, in sentences; those of images of size `batch`, or of the models'
        own.

        Raises `TransferError` for grids that do not go together.
        """
        if teacher == student:
            return []
        grids = f"the teacher's patch grid is {words(teacher)} and the student's {words(student)}"
        agree = (
            "set teacher.img_size (or student.img_size; in Python graftvit.models.resize(model, (height, width))) "
            "so that"
        )
        if batch is not None:
            grids = f"for images of {words(batch)}, {grids}"
            agree = "feed images of the student's own size, or build both models with dynamic_img_size=true so that"
        if self.copy:
            needs = (
                "attention can be copied only between equal grids"
                if self.method is None
                else f"transfer.method={self.method} needs equal grids"
            )
            raise TransferError(
                f"{grids}, and {needs}; {agree} both models have the same number of patches a side"
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


class ImageSizes:
    """Which image sizes and grids a teacher and a student have, as they are at each call: a model may be resized."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        for model in (teacher, student):
            if find_family(model) is None:
                raise UnsupportedModelError(
                    f"{type(model).__name__} has no patch embedding for the whole model; supported are {SUPPORTED}"
                )
        self._models = (teacher, student)

    def grids(self, images: Size) -> Grids:
        """Return the grids of images of this size for the student. Raises `TransferError`: a model does not take
        them."""
        teacher, student = self._models
        own = _take(student, "student", images)
        return Grids(_take(teacher, "teacher", self.teacher_size(images)), own)

    def teacher_size(self, images: Size) -> Size:
        """Return the size at which the teacher sees images of this size for the student.

        At the student's own size it is the teacher's own. At another size, a teacher that takes any size gets as many
        more patches as the student, so that equal grids stay equal; a teacher of a single size keeps its own. Where one
        of the two is a pyramid, the teacher's images grow as the student's do.
        """
        teacher, student = self._models
        own_t, own_s = self.own_sizes
        if images == own_s or _is_strict(teacher):
            return own_t
        step = _whole_patch(teacher)
        if is_pyramid(teacher) or is_pyramid(student):
            return _proportional(own_t, own_s, images, step)
        theirs, ours = _first_grid(teacher, own_t), _first_grid(student, own_s)
        height, width = _proportional(theirs, ours, _first_grid(student, images), (1, 1))
        return height * step[0], width * step[1]

    @property
    def own_sizes(self) -> tuple[Size, Size]:
        """The image sizes that teacher and student were built for."""
        teacher, student = self._models
        return own_size(teacher), own_size(student)


def own_size(model: nn.Module) -> Size:
    """Height and width of the images that a model was built for."""
    size = family_of(model).image_size(model)
    if size is None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no image size, so the grids of its stages are unknown: resize it "
            "(graftvit.models.conversion.resize)"
        )
    return size


def words(size: Size) -> str:
    """Return a size or a grid as it is written."""
    return f"{size[0]}x{size[1]}"


def _is_strict(model: nn.Module) -> bool:
    """Return whether a model takes only images of its own size."""
    return bool(getattr(getattr(model, "patch_embed", None), "strict_img_size", False))


def _whole_patch(model: nn.Module) -> Size:
    """Return the height and width of which images are whole multiples; one pixel for a pyramid, which pads or cuts."""
    return (1, 1) if is_pyramid(model) else patch_size(model)


def _first_grid(model: nn.Module, images: Size) -> Size:
    return family_of(model).geometries(model, images)[0].grid


def _proportional(teacher: Size, student: Size, now: Size, step: Size) -> Size:
    """Return teacher · now / student, rounded to whole steps of at least one."""
    height, width = (
        max(1, (2 * t * n + s * p) // (2 * s * p)) * p
        for t, s, n, p in zip(teacher, student, now, step, strict=True)
    )
    return height, width


def _take(model: nn.Module, name: str, images: Size) -> tuple[Size, ...]:
    """Return the grids of images of this size, by stage. Raises `TransferError`: the model does not take them."""
    own, embedding = own_size(model), getattr(model, "patch_embed", None)
    if _is_strict(model) and images != own:
        raise TransferError(
            f"the images are {words(images)} and the {name} takes {words(own)} alone; resize them, set "
            f"{name}.img_size, or build it with {name}.model_args.dynamic_img_size=true"
        )
    grids = tuple(stage.grid for stage in family_of(model).geometries(model, images))
    if is_pyramid(model) and min(map(min, grids)) < 1:
        raise TransferError(
            f"images of {words(images)} leave no token in a stage of the {name}: set {name}.img_size to more"
        )
    if min(map(min, grids)) < 1 or not fills(embedding, images):
        patch = patch_size(model)
        raise TransferError(
            f"images of {words(images)} are not whole patches of {words(patch)}, as the {name} needs them: "
            f"set {name}.img_size to whole patches, such as {words(_whole(images, patch))}"
        )
    return grids


def _whole(images: Size, patch: Size) -> Size:
    height, width = (max(1, round(side / step)) * step for side, step in zip(images, patch, strict=True))
    return height, width
