"""Which teacher token stands for which student token, and how attention moves to another patch grid.

Prefix tokens are matched by kind (class, distillation, register by its number), patch tokens by their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TransferError
from ..families import TokenLayout


@dataclass(frozen=True)
class TokenMatch:
    """Token k of `teacher` stands for token k of `student`; both are indices into their sequences.

    None stands for all tokens in order, the fast path. Where grids differ, the teacher's indices are into its
    sequence after `interpolate_tokens` has brought it to the student's grid.
    """

    teacher: tuple[int, ...] | None
    student: tuple[int, ...] | None
    student_only: tuple[int, ...]  # student tokens without a counterpart
    report: tuple[str, ...]  # what was left out or interpolated, in sentences


def match_tokens(
    teacher: TokenLayout, student: TokenLayout, *, interpolate_grid: bool, copy: bool
) -> TokenMatch:
    """Match the tokens of two models. Raises `TransferError` for unequal grids.

    Unequal grids are always refused for the copy methods; distillation accepts them with `interpolate_grid`.
    """
    report = _check_grids(teacher, student, interpolate_grid, copy)
    shared = [kind for kind in student.prefix if kind in teacher.prefix]
    patches = student.grid[0] * student.grid[1]
    teacher_tokens = [teacher.prefix.index(kind) for kind in shared]
    teacher_tokens += range(teacher.num_prefix, teacher.num_prefix + patches)
    student_tokens = [student.prefix.index(kind) for kind in shared]
    student_tokens += range(student.num_prefix, student.num_prefix + patches)
    teacher_only = [kind for kind in teacher.prefix if kind not in shared]
    student_only = [kind for kind in student.prefix if kind not in shared]
    if teacher_only:
        report.append(f"teacher tokens without a counterpart in the student: {', '.join(teacher_only)}")
    if student_only:
        report.append(f"student tokens without a counterpart in the teacher: {', '.join(student_only)}")
    return TokenMatch(
        teacher=_unless_all(teacher_tokens, teacher.num_prefix + patches),
        student=_unless_all(student_tokens, student.num_tokens),
        student_only=tuple(student.prefix.index(kind) for kind in student_only),
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


def _check_grids(teacher: TokenLayout, student: TokenLayout, interpolate_grid: bool, copy: bool) -> list[str]:
    if teacher.grid == student.grid:
        return []
    grids = f"the teacher's patch grid is {_size(teacher.grid)} and the student's {_size(student.grid)}"
    if copy:
        raise TransferError(
            f"{grids}, and attention can be copied only between equal grids; set teacher.img_size (or "
            "student.img_size) so that both models have the same number of patches a side"
        )
    if not interpolate_grid:
        raise TransferError(
            f"{grids}; set teacher.img_size (or student.img_size) so that they agree, or "
            "transfer.interpolate_grid=true to interpolate the teacher's attention logits"
        )
    return [f"{grids}: the teacher's queries and keys are interpolated, and so its attention logits"]


def _size(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"


def _unless_all(tokens: Sequence[int], count: int) -> tuple[int, ...] | None:
    return None if list(tokens) == list(range(count)) else tuple(tokens)
