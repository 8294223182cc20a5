"""Turn the student's images into the teacher's: its normalization and its image size."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import any_timm
from ..errors import TransferError
from ..families import find_family, image_channels
from .grids import GridRule, Grids, ImageSizes

LARGEST = 1e6
"""Bound of a mean, of a deviation and of its inverse, so that an image is finite in float32."""


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, of images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Renormalized(nn.Module):
    """x · std_s / std_t + (mean_s − mean_t) / std_t, then a bicubic resize to `size`, where it is given."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        channels: int,
        teacher_norm: Normalization,
        student_norm: Normalization,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        teacher_mean, teacher_std, mean, std = (
            torch.tensor(values, dtype=torch.float64).expand(channels)
            for values in (*teacher_norm, *student_norm)
        )
        self.register_buffer("scale", (std / teacher_std).float().view(-1, 1, 1), persistent=False)
        self.register_buffer(
            "shift", ((mean - teacher_mean) / teacher_std).float().view(-1, 1, 1), persistent=False
        )
        self.same_normalization = teacher_norm == student_norm
        self.size = size

    def teacher_size(self, images: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which images of this size are shown."""
        return images if self.size is None else self.size

    def forward(self, images: Tensor) -> Tensor:
        size = self.teacher_size((images.shape[-2], images.shape[-1]))
        if not self.same_normalization:
            images = images * self.scale + self.shift
        if images.shape[-2:] != size:  # in float32: torch has no such resize in half precision
            precise = images.to(torch.promote_types(images.dtype, torch.float32))
            images = F.interpolate(precise, size, mode="bicubic", antialias=True).to(images.dtype)
        return images


class ShownImages(Renormalized):
    """The images of a student, as a teacher of it is shown them."""

    dtype: torch.dtype | None = None
    """Of a teacher with weights of its own type; None for the type of the student's images."""

    def forward(self, images: Tensor) -> Tensor:
        shown: Tensor = super().forward(images)
        return shown if self.dtype is None else shown.to(self.dtype)

    def grids(self, images: Tensor, rule: GridRule | None) -> Grids | None:
        """Return the patch grids of teacher and student for these images; None where no patches are compared.

        Raises TransferError: a model does not take images of this size, or the rule refuses the grids.
        """
        return None

    def describe(self) -> list[str]:
        """Describe each change to the images in one sentence."""
        return [] if self.same_normalization else ["images are renormalized for the teacher"]


class WholeInput(ShownImages):
    """The images of a student, as a teacher is shown them of which only whole results are used.

    They are shown at `size` (height, width); by default at the only size that the teacher takes, or as they are.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        teacher_norm: Normalization,
        student_norm: Normalization,
        size: tuple[int, int] | None = None,
    ) -> None:
        channels = any_timm.image_channels(teacher), image_channels(student)
        _check_channels(*channels)
        super().__init__(channels[0], teacher_norm, student_norm, size or any_timm.fixed_size(teacher))
        family = find_family(student)
        self.own_size = any_timm.fixed_size(student) if family is None else family.image_size(student)

    def describe(self) -> list[str]:
        resized = (
            [] if self.size in (None, self.own_size) else [f"images are shown to the teacher at {self.size}"]
        )
        return super().describe() + resized


class TeacherInput(ShownImages):
    """The images of a student, as a teacher of it is shown them.

    It sees them at its own size; `ImageSizes.teacher_size` says how those of another size than the student's own.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, teacher_norm: Normalization, student_norm: Normalization
    ) -> None:
        channels = image_channels(teacher), image_channels(student)
        _check_channels(*channels)
        super().__init__(channels[0], teacher_norm, student_norm)
        self.sizes = ImageSizes(teacher, student)
        _, own = self.sizes.own_sizes
        self.sizes.grids(own)  # a size that a model does not take is refused at once

    def teacher_size(self, images: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which images of this size are shown."""
        return self.sizes.teacher_size(images)

    def grids(self, images: Tensor, rule: GridRule | None) -> Grids:
        """Return the patch grids of teacher and student for these images.

        Raises `TransferError`: a model does not take images of this size, or the rule refuses the grids.
        """
        size = (images.shape[-2], images.shape[-1])
        grids = self.sizes.grids(size)
        if rule is not None:
            rule.check_batch(grids, size)
        return grids

    def describe(self) -> list[str]:
        teacher, student = self.sizes.own_sizes
        resized = [] if teacher == student else [f"images are resized to {teacher} for the teacher"]
        return super().describe() + resized


def _check_channels(teacher: int, student: int) -> None:
    if teacher != student:
        raise TransferError(
            f"teacher takes {teacher} image channels and student {student}; "
            "set student.model_args.in_chans or teacher.model_args.in_chans so that they agree"
        )
