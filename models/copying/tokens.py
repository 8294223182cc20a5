"""Which teacher token stands for which student token, and how attention moves to another patch grid.

Prefix tokens are matched by kind (class, distillation, register by its number), patch tokens by their place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..families import TokenLayout
from .grids import GridRule
from .places import pick_dim


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
