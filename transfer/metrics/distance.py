"""How far a student's features are from its teacher's, in sums over batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.copying.grids import GridRule
from ...models.copying.links import LayerPair
from ...models.copying.tokens import TokenMatch, match_tokens
from ...models.errors import DataError, TransferError, UnsupportedModelError
from ...models.families import attention_shape, check_supported, token_layout
from ..methods.pairs import resolve_layers
from .ranks import exact, summed
from .reader import Reader, Reading


@dataclass(frozen=True)
class Distance:
    """Of features S from features T, a row an image or a token.

    `relative_error` is ‖S − T‖ / ‖T‖ and `cosine` the mean over rows of s·t / (‖s‖ ‖t‖); None where the widths
    differ. `cka` is the centered kernel alignment with a linear kernel (arXiv:1905.00414): with each column's mean
    taken off, ‖SᵀT‖² / (‖SᵀS‖ ‖TᵀT‖), 1 for features that are equal up to rotation and scale. Norms are Frobenius's.
    """

    relative_error: float | None
    cosine: float | None
    cka: float
    rows: int


@dataclass(frozen=True)
class Distances:
    """Of the final feature, and of the outputs of the student's blocks by layer."""

    feature: Distance
    layers: Mapping[int, Distance] = field(default_factory=dict)


class DistanceSums:
    """Sums over batches of rows, from which a `Distance` follows. Nothing here waits for the device.

    Means and products are merged batch by batch (Chan, Golub and LeVeque 1983): features have columns whose mean
    is far larger than their deviation, and sums of plain squares would lose the latter.
    """

    def __init__(self) -> None:
        self._widths: tuple[int, int] | None = None

    def update(self, student_ND: Tensor, teacher_ND: Tensor, valid_N: Tensor) -> None:
        """Add the rows that are `valid_N`."""
        kind = torch.promote_types(torch.float32, torch.promote_types(student_ND.dtype, teacher_ND.dtype))
        student_ND, teacher_ND = (
            torch.where(valid_N[:, None], rows.to(kind), 0) for rows in (student_ND, teacher_ND)
        )
        both_ND = torch.cat([student_ND, teacher_ND], dim=1)
        if self._widths is None:
            self._begin(student_ND, teacher_ND)
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
        self._merge(count, mean_D, (centered_ND.T @ centered_ND).to(self._products_DD))

    def result(self) -> Distance:
        """Return the distance over all rows of all processes, which all call it. Raises DataError without rows."""
        if self._widths is None or not (rows := round(float(count := summed(self._count.clone())))):
            raise DataError("no image could be compared: the split is empty")
        mean_D = summed(self._count * self._mean_D) / count
        offset_D = self._mean_D - mean_D
        products_DD = summed(self._products_DD + self._count * torch.outer(offset_D, offset_D))
        width = self._widths[0]
        student, teacher = products_DD[:width, :width].norm(), products_DD[width:, width:].norm()
        cross = products_DD[:width, width:].square().sum()
        cka = float(cross / (student * teacher).clamp(min=torch.finfo(cross.dtype).tiny))
        if width != self._widths[1]:
            return Distance(None, None, cka, rows)
        difference, size, cosines = summed(self._sums.clone()).tolist()
        return Distance((difference / size) ** 0.5 if size else 0.0, cosines / rows, cka, rows)

    def _begin(self, student_ND: Tensor, teacher_ND: Tensor) -> None:
        self._widths = student_ND.shape[1], teacher_ND.shape[1]
        width, device = sum(self._widths), student_ND.device
        self._sums, self._count, self._mean_D, self._products_DD = (
            torch.zeros(shape, dtype=exact(device), device=device)
            for shape in ((3,), (), (width,), (width, width))
        )

    def _merge(self, count: Tensor, mean_D: Tensor, products_DD: Tensor) -> None:
        offset_D, total = mean_D - self._mean_D, self._count + count
        share = count / total.clamp(min=1)
        self._products_DD += products_DD + self._count * share * torch.outer(offset_D, offset_D)
        self._mean_D += share * offset_D
        self._count = total


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
