"""What the teacher is shown: the student's images, normalised and sized as the teacher was trained."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TransferError


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, of images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class TeacherInput(nn.Module):
    """x · std_s / std_t + (mean_s − mean_t) / std_t, then a bicubic resize where the teacher's resolution differs."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, teacher: nn.Module, student: nn.Module, teacher_norm: Normalization, student_norm: Normalization
    ) -> None:
        super().__init__()
        channels = [int(model.patch_embed.proj.in_channels) for model in (teacher, student)]  # type: ignore[union-attr, arg-type]
        if channels[0] != channels[1]:
            raise TransferError(
                f"teacher takes {channels[0]} image channels and student {channels[1]}; "
                "set student.model_args.in_chans or teacher.model_args.in_chans so that they agree"
            )
        teacher_mean, teacher_std, mean, std = (
            torch.tensor(values, dtype=torch.float64).expand(channels[0])
            for values in (*teacher_norm, *student_norm)
        )
        self.register_buffer("scale", (std / teacher_std).float().view(-1, 1, 1), persistent=False)
        self.register_buffer(
            "shift", ((mean - teacher_mean) / teacher_std).float().view(-1, 1, 1), persistent=False
        )
        self.same_normalization = teacher_norm == student_norm
        self.size = _fixed_size(teacher)
        student_size = _size(student)
        self.resizes = self.size is not None and self.size != student_size

    def forward(self, images: Tensor) -> Tensor:
        if not self.same_normalization:
            images = images * self.scale + self.shift
        if self.size is not None and images.shape[-2:] != self.size:
            precise = images.to(
                torch.promote_types(images.dtype, torch.float32)
            )  # torch has none in half precision
            images = F.interpolate(precise, self.size, mode="bicubic", antialias=True).to(images.dtype)
        return images

    def describe(self) -> list[str]:
        """One sentence for each thing that is done to the images."""
        lines = []
        if not self.same_normalization:
            lines.append("images are re-normalised for the teacher")
        if self.resizes:
            lines.append(f"images are resized to {self.size} for the teacher")
        return lines


def _size(model: Any) -> tuple[int, int] | None:
    size = model.patch_embed.img_size
    return None if size is None else (int(size[0]), int(size[1]))


def _fixed_size(model: Any) -> tuple[int, int] | None:
    return None if getattr(model, "dynamic_img_size", False) else _size(model)
