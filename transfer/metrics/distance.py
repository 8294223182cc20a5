"""How far a student's features are from its teacher's, in sums over batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.copying.grids import GridRule, TokenMatch, match_tokens
from ...models.copying.tape import LayerPair
from ...models.errors import DataError, TransferError, UnsupportedModelError
from ...models.families import attention_shape, check_supported, token_layout
from ..methods.pairs import resolve_layers
from .ranks import exact, summed
from .reader import Reader, Reading


@dataclass(frozen=True)
class Distance:
    """Of features S from features T, a row an image or a token.

    `relative_error` is ‖S − T‖ / ‖T‖ and `cosine` the mean over rows of s·t / (‖s‖ ‖t‖); None where the widths
    differ. Norms are Frobenius's.

    `cka` is the centered kernel alignment HSIC(S, T) / √(HSIC(S, S) HSIC(T, T)) with a linear kernel (arXiv:1905.00414)
    and the unbiased estimate of HSIC (Song et al. 2012, equation 5; arXiv:2010.15327, section 3): 1 for features that
    are equal up to rotation and scale, about 0 for independent ones, however few the rows. None with fewer than 4
    rows, for which there is no such estimate.
    """

    relative_error: float | None
    cosine: float | None
    cka: float | None
    rows: int


@dataclass(frozen=True)
class Distances:
    """Of the final feature, and of the outputs of the student's blocks by layer."""

    feature: Distance
    layers: Mapping[int, Distance] = field(default_factory=dict)


LEAST_ROWS = 4
"""The unbiased estimate of HSIC divides by rows − 3."""


@dataclass(frozen=True)
class _Moments:
    """Sums over rows z = (s, t) of features whose mean is taken off, with q = (‖s‖², ‖t‖²)."""

    products: Tensor
    """Σ z zᵀ."""
    cubes: Tensor
    """Σ q zᵀ."""
    squares: Tensor
    """Σ q qᵀ."""
    widths: tuple[int, int]

    @classmethod
    def of(cls, rows_ND: Tensor, widths: tuple[int, int], kind: torch.dtype) -> _Moments:
        """Return the moments of centered rows, in numbers of `kind`."""
        norms_N2 = torch.stack([part.square().sum(1) for part in rows_ND.split(widths, 1)], 1).to(kind)
        products_DD = (rows_ND.T @ rows_ND).to(kind)
        return cls(products_DD, norms_N2.T @ rows_ND.to(kind), norms_N2.T @ norms_N2, widths)

    def moved(self, count: Tensor, offset_D: Tensor) -> _Moments:
        """Return the moments of the rows z + offset; Σ z = 0 of the `count` rows.

        q becomes q + A z + r, with A z = 2 (s·offset_s, t·offset_t) and r = (‖offset_s‖², ‖offset_t‖²).
        """
        parts = offset_D.split(self.widths)
        turn_2D = 2 * torch.block_diag(*parts).to(offset_D)
        fixed_2 = torch.stack([part.square().sum() for part in parts])
        norms_2 = self._norms()
        linear_22 = self.cubes @ turn_2D.T + torch.outer(norms_2, fixed_2)
        return _Moments(
            self.products + count * torch.outer(offset_D, offset_D),
            self.cubes + turn_2D @ self.products + torch.outer(norms_2 + count * fixed_2, offset_D),
            self.squares + linear_22 + linear_22.T + turn_2D @ self.products @ turn_2D.T
            + count * torch.outer(fixed_2, fixed_2),
            self.widths,
        )  # fmt: skip

    def plus(self, other: _Moments) -> _Moments:
        return _Moments(
            self.products + other.products,
            self.cubes + other.cubes,
            self.squares + other.squares,
            self.widths,
        )

    def over_ranks(self) -> _Moments:
        return _Moments(summed(self.products), summed(self.cubes), summed(self.squares), self.widths)

    def alignment(self, rows: int) -> float:
        """Return the alignment of s and t; 0 where one of them varies no more than by chance.

        With rows that sum to zero, the kernels K = S Sᵀ and L = T Tᵀ without their diagonals give rows · (rows − 3) ·
        HSIC = ‖SᵀT‖² + Σ‖s‖² Σ‖t‖² / ((rows − 1) (rows − 2)) − rows / (rows − 2) · Σ ‖s‖² ‖t‖².
        """
        norms_2 = self._norms()
        halves = [half.split(self.widths, 1) for half in self.products.split(self.widths)]
        kernels_22 = torch.stack([torch.stack([part.square().sum() for part in half]) for half in halves])
        means_22 = torch.outer(norms_2, norms_2) / ((rows - 1) * (rows - 2))
        hsic_22 = kernels_22 + means_22 - rows / (rows - 2) * self.squares
        student, teacher = (float(hsic_22[part, part]) for part in (0, 1))
        least = torch.finfo(hsic_22.dtype).eps * float(means_22.diagonal().max())
        return float(hsic_22[0, 1]) / (student * teacher) ** 0.5 if min(student, teacher) > least else 0.0

    def _norms(self) -> Tensor:
        """Return Σ q."""
        return torch.stack([part.sum() for part in self.products.diagonal().split(self.widths)])


class DistanceSums:
    """Sums over batches of rows, from which a `Distance` follows. Nothing here waits for the device.

    Means and products are merged batch by batch (Chan, Golub and LeVeque 1983): features have columns whose mean
    is far larger than their deviation, and sums of plain squares would lose the latter.
    """

    def __init__(self) -> None:
        self._widths: tuple[int, int] | None = None
        self._sums: Tensor
        self._count: Tensor
        self._mean_D: Tensor
        self._moments: _Moments

    def update(self, student_ND: Tensor, teacher_ND: Tensor, valid_N: Tensor) -> None:
        """Add the rows that are `valid_N`."""
        kind = torch.promote_types(torch.float32, torch.promote_types(student_ND.dtype, teacher_ND.dtype))
        student_ND, teacher_ND = (
            torch.where(valid_N[:, None], rows.to(kind), 0) for rows in (student_ND, teacher_ND)
        )
        both_ND = torch.cat([student_ND, teacher_ND], dim=1)
        widths = student_ND.shape[1], teacher_ND.shape[1]
        if self._widths is None:
            self._begin(widths, student_ND.device)
        if student_ND.shape[1] == teacher_ND.shape[1]:
            terms = torch.stack([
                (student_ND - teacher_ND).square().sum(1),
                teacher_ND.square().sum(1),
                F.cosine_similarity(student_ND, teacher_ND),
            ])  # fmt: skip
            self._sums += terms.to(self._sums).sum(1)
        count = valid_N.sum().to(self._count)
        mean_D = both_ND.to(self._mean_D).sum(0) / count.clamp(min=1)
        centered_ND = torch.where(valid_N[:, None], both_ND - mean_D.to(kind), 0)
        batch = _Moments.of(centered_ND, widths, self._moments.products.dtype)
        total = self._count + count
        offset_D = (mean_D - self._mean_D) * (count / total.clamp(min=1))
        ours = self._moments.moved(self._count, -offset_D)
        self._moments = ours.plus(batch.moved(count, mean_D - self._mean_D - offset_D))
        self._mean_D, self._count = self._mean_D + offset_D, total

    def result(self) -> Distance:
        """Return the distance over all rows of all processes, which all call it. Raises DataError without rows."""
        if self._widths is None or not (rows := round(float(count := summed(self._count.clone())))):
            raise DataError("no image could be compared: the split is empty")
        mean_D = summed(self._count * self._mean_D) / count
        moments = self._moments.moved(self._count, self._mean_D - mean_D).over_ranks()
        cka = None if rows < LEAST_ROWS else moments.alignment(rows)
        if self._widths[0] != self._widths[1]:
            if cka is None:
                raise DataError(
                    f"features of widths {self._widths[0]} and {self._widths[1]} are compared by CKA alone, which "
                    f"needs {LEAST_ROWS} images: there are {rows}"
                )
            return Distance(None, None, cka, rows)
        difference, size, cosines = summed(self._sums.clone()).tolist()
        return Distance((difference / size) ** 0.5 if size else 0.0, cosines / rows, cka, rows)

    def _begin(self, widths: tuple[int, int], device: torch.device) -> None:
        self._widths, width = widths, sum(widths)
        self._sums, self._count, self._mean_D = (
            torch.zeros(shape, dtype=exact(device), device=device) for shape in ((3,), (), (width,))
        )
        nothing_ND = torch.zeros(0, width, device=device)
        self._moments = _Moments.of(nothing_ND, widths, exact(device))


@dataclass(frozen=True)
class ComparedLayers:
    """Which blocks' outputs are compared, and which tokens of theirs."""

    pairs: tuple[LayerPair, ...] = ()
    tokens: TokenMatch | None = None

    @property
    def teacher(self) -> tuple[int, ...]:
        return tuple({pair.teacher for pair in self.pairs})

    @property
    def student(self) -> tuple[int, ...]:
        return tuple(pair.student for pair in self.pairs)

    def rows(
        self, pair: LayerPair, student: Reading, teacher: Reading, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens of a pair of blocks as rows, the student's and the teacher's, and which of them are
        valid."""
        student_BND, teacher_BND = student.blocks[pair.student], teacher.blocks[pair.teacher]
        if self.tokens is not None:
            student_BND = self.tokens.student.pick(student_BND, 1)
            teacher_BND = self.tokens.teacher.pick(teacher_BND, 1)
        valid_N = valid.repeat_interleave(student_BND.shape[1])
        return student_BND.flatten(0, 1), teacher_BND.flatten(0, 1), valid_N


def compared_layers(teacher: nn.Module, student: nn.Module) -> ComparedLayers:
    """Return each student's block with the teacher's at the same share of the depth; none where the patch grids
    differ."""
    try:
        for model in (teacher, student):
            check_supported(model)
        tokens = match_tokens(token_layout(teacher), token_layout(student), GridRule(copy=True))
    except (TransferError, UnsupportedModelError):
        return ComparedLayers()
    depths = [attention_shape(teacher).depth], [attention_shape(student).depth]
    return ComparedLayers(resolve_layers("all", *depths), tokens)


@torch.no_grad()
def measure_distances(
    students: Mapping[str, Reader],
    teacher: Reader,
    layers: Mapping[str, ComparedLayers],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    device: torch.device,
) -> dict[str, Distances]:
    """Return each student's distances from the teacher over `batches` of (images, targets, valid), in one pass.

    Call it on all processes. The models are in eval mode already. Raises DataError: there is no image.
    """
    features = {name: DistanceSums() for name in students}
    blocks = {name: {pair: DistanceSums() for pair in layers[name].pairs} for name in students}
    for images, _, valid in batches:
        images, valid = images.to(device, non_blocking=True), valid.to(device, non_blocking=True)
        theirs = teacher(images)
        for name, student in students.items():
            ours = student(images)
            features[name].update(ours.feature, theirs.feature, valid)
            for pair, comparison in blocks[name].items():
                comparison.update(*layers[name].rows(pair, ours, theirs, valid))
    for reader in (*students.values(), teacher):
        reader.forget()
    return {
        name: Distances(
            features[name].result(), {pair.student: each.result() for pair, each in blocks[name].items()}
        )
        for name in students
    }
