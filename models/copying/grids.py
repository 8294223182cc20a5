"""Which image size and patch grid teacher and student have for a batch, and whether these grids go together.

A model with `dynamic_img_size` has another grid for each image size, so what counts is the batch, and neither the size
that the model was built for nor the number of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TransferError, UnsupportedModelError
from ..families import TokenLayout, family_of, fills

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
            family_of(model)  # another model is refused
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
        of the two takes any number of pixels, as a pyramid does, the teacher's images grow as the student's do.
        """
        teacher, student = self._models
        own_t, own_s = self.own_sizes
        if images == own_s or _is_strict(teacher):
            return own_t
        step = family_of(teacher).image_step(teacher)
        if (1, 1) in (step, family_of(student).image_step(student)):
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
            "(graftvit.models.resize)"
        )
    return size


def words(size: Size) -> str:
    """Return a size or a grid as it is written."""
    return f"{size[0]}x{size[1]}"


def _is_strict(model: nn.Module) -> bool:
    """Return whether a model takes only images of its own size."""
    return family_of(model).is_strict(model)


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
    patch = family_of(model).image_step(model)
    if patch == (1, 1) and min(map(min, grids)) < 1:
        raise TransferError(
            f"images of {words(images)} leave no token in a stage of the {name}: set {name}.img_size to more"
        )
    if min(map(min, grids)) < 1 or not fills(embedding, images):
        raise TransferError(
            f"images of {words(images)} are not whole patches of {words(patch)}, as the {name} needs them: "
            f"set {name}.img_size to whole patches, such as {words(_whole(images, patch))}"
        )
    return grids


def _whole(images: Size, patch: Size) -> Size:
    height, width = (max(1, round(side / step)) * step for side, step in zip(images, patch, strict=True))
    return height, width


# Select and replace heads or tokens at places that Python knows, without an index tensor.
#
# To make an index tensor on a GPU, its numbers are copied there, and the copy waits for all that the GPU has to do.

Run = tuple[int, int]
"""First and last place, the last excluded."""


def runs_of(index: Sequence[int]) -> list[Run]:
    """Return the runs of consecutive places in `index`, in its order."""
    runs: list[Run] = []
    for place in index:
        if runs and runs[-1][1] == place:
            runs[-1] = runs[-1][0], place + 1
        else:
            runs.append((place, place + 1))
    return runs


def pick_dim(x: Tensor, dim: int, index: Sequence[int] | None) -> Tensor:
    """Return `x` at `index` along `dim`: a view where the index is one run, a copy otherwise."""
    if index is None:
        return x
    runs = runs_of(index)
    if len(runs) == 1:
        return x.narrow(dim, runs[0][0], len(index))
    cuts = sorted({0, x.shape[dim], *(place for run in runs for place in run)})
    sizes = [stop - start for start, stop in pairwise(cuts)]
    pieces = dict(zip(cuts, x.split(sizes, dim), strict=False))  # one split: its backward pass is one copy
    return torch.cat([pieces[cut] for start, stop in runs for cut in cuts if start <= cut < stop], dim)


def put_dim(part: Tensor, whole: Tensor, dim: int, index: Sequence[int]) -> Tensor:
    """Return a copy of `whole` with `part` at the different places `index` along `dim`."""
    runs = runs_of(index)
    given = dict(zip(runs, part.split([stop - start for start, stop in runs], dim), strict=True))
    cuts = sorted({0, whole.shape[dim], *(place for run in runs for place in run)})
    segments = list(pairwise(cuts))
    kept = whole.split([stop - start for start, stop in segments], dim)
    return torch.cat([given.get(each, own) for each, own in zip(segments, kept, strict=True)], dim)


# Which teacher token stands for which student token, and how attention moves to another patch grid.
#
# Prefix tokens are matched by kind (class, distillation, register by its number), patch tokens by their place.


@dataclass(frozen=True)
class Tokens:
    """Tokens of a sequence: some of its prefix tokens, in this order, then every patch, however many there are."""

    prefix: tuple[int, ...]
    num_prefix: int
    """How many prefix tokens the sequence has."""

    @property
    def whole(self) -> bool:
        """All tokens in order: the fast path."""
        return self.prefix == tuple(range(self.num_prefix))

    def index(self, length: int) -> list[int]:
        """Return their places in a sequence of this length."""
        return [*self.prefix, *range(self.num_prefix, length)]

    def pick(self, x: Tensor, dim: int) -> Tensor:
        """`x` at these tokens along `dim`: a view where they are a run, a copy otherwise."""
        length, start = x.shape[dim], self.num_prefix - len(self.prefix)
        if self.whole:
            return x
        if self.prefix == tuple(range(start, self.num_prefix)):
            return x.narrow(dim, start, length - start)
        return pick_dim(x, dim, self.index(length))


@dataclass(frozen=True)
class TokenMatch:
    """Token k of `teacher` corresponds to token k of `student`, in sequences on the same patch grid.

    Where grids differ, the teacher's sequence is that which `interpolate_tokens` has brought to the student's grid.
    """

    teacher: Tokens
    student: Tokens
    student_only: tuple[int, ...]  # student tokens without a counterpart
    report: tuple[str, ...]  # what was left out or interpolated, in sentences


def match_tokens(teacher: TokenLayout, student: TokenLayout, rule: GridRule) -> TokenMatch:
    """Match the tokens of two models. Raises `TransferError` for grids that the rule refuses."""
    report = rule.check(teacher.grid, student.grid)
    theirs, ours = ({kind: place for place, kind in enumerate(each.prefix)} for each in (teacher, student))
    shared = [kind for kind in ours if kind in theirs]
    teacher_only = [kind for kind in theirs if kind not in ours]
    student_only = [kind for kind in ours if kind not in theirs]
    if teacher_only:
        report.append(f"teacher tokens without a counterpart in the student: {', '.join(teacher_only)}")
    if student_only:
        report.append(f"student tokens without a counterpart in the teacher: {', '.join(student_only)}")
    return TokenMatch(
        teacher=Tokens(tuple(theirs[kind] for kind in shared), teacher.num_prefix),
        student=Tokens(tuple(ours[kind] for kind in shared), student.num_prefix),
        student_only=tuple(ours[kind] for kind in student_only),
        report=tuple(report),
    )


def interpolate_tokens(x_BHND: Tensor, num_prefix: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bilinear interpolation (align_corners=False) of queries or keys from patch grid `old` to grid `new`.

    It is linear, x' = R x, so interpolating queries and keys interpolates the logits over both axes:
    Q' K'^T = (R Q)(R K)^T = R (Q K^T) R^T. Prefix tokens are kept. Shapes: (B, H, N, D) to (B, H, N', D).
    """
    if old == new:
        return x_BHND
    batch, heads, _, width = x_BHND.shape
    prefix_BHPD, patches_BHND = x_BHND[:, :, :num_prefix], x_BHND[:, :, num_prefix:]
    image = patches_BHND.transpose(2, 3).reshape(batch, heads * width, *old)
    image = F.interpolate(image, size=new, mode="bilinear", align_corners=False)
    patches_BHND = image.reshape(batch, heads, width, new[0] * new[1]).transpose(2, 3)
    return torch.cat((prefix_BHPD, patches_BHND), dim=2)
