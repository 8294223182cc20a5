"""Standardized features of a teacher, and the statistics of training images that they need.

PHI-S (arXiv:2410.01680, section 3): with the mean μ and the covariance Σ = U Λ Uᵀ of a teacher's features x (C), and a
Hadamard matrix H of order C,

    x' = H Uᵀ (x - μ) / (√C φ),    φ² = trace(Λ) / C.

H Uᵀ / √C is a rotation after which every dimension has the variance φ², so one scale standardizes all dimensions, and
distances between features keep their proportions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...models.attention.kernels import precise
from ...models.errors import DataError, TransferError, kind_of

# Hadamard matrices: entries of +1 and -1, and rows that are orthogonal.


def hadamard_matrix(order: int) -> Tensor | None:
    """Return a Hadamard matrix (order, order) in float64, or None where Sylvester and Paley give none.

    H Hᵀ = order · I. Sylvester doubles a matrix of half the order. Paley makes one of order q + 1, or 2 (q + 1), from
    the squares modulo a prime q that leaves 3, or 1, when divided by 4.
    """
    doublings, base = 0, order
    while base > 0:
        found = _base(base)
        if found is not None:
            return _doubled(found, doublings)
        if base % 2:
            return None
        doublings, base = doublings + 1, base // 2
    return None


def _base(order: int) -> Tensor | None:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4 == 0 and (order - 1) % 4 == 3 and _is_prime(order - 1):
        return _paley_first(order - 1)
    half = order // 2 - 1
    if order % 4 == 0 and half % 4 == 1 and _is_prime(half):
        return _paley_second(half)
    return None


def _doubled(matrix: Tensor, times: int) -> Tensor:
    """Return the matrix [[H, H], [H, -H]], `times` times."""
    for _ in range(times):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _paley_first(prime: int) -> Tensor:
    """Return I + S, where S = [[0, 1ᵀ], [-1, Q]] and Q is skew-symmetric."""
    skew = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 0] = 0
    skew[1:, 0] = -1
    skew[1:, 1:] = _residues(prime)
    return skew + torch.eye(prime + 1, dtype=torch.float64)


def _paley_second(prime: int) -> Tensor:
    """Return C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]], where C = [[0, 1ᵀ], [1, Q]] and Q is symmetric."""
    conference = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = _residues(prime)
    sign = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, sign) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), diagonal)


def _residues(prime: int) -> Tensor:
    """Return Q with Q[i, j] = χ(i - j): 1 for a square modulo the prime, -1 for another number, 0 for 0."""
    kind = torch.full((prime,), -1.0, dtype=torch.float64)
    numbers = torch.arange(1, prime)
    kind[numbers * numbers % prime] = 1
    kind[0] = 0
    index = torch.arange(prime)
    return kind[(index[:, None] - index[None]) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


Batch = Tensor | Sequence[Tensor] | tuple[Tensor, Mapping[str, Tensor]]
"""Images; images and their labels, as of a DataLoader; or images and what the teachers gave for them before."""


class Standardizer(nn.Module):
    """Features (..., C) with mean 0 and variance 1, in float32.

    `dimension`: each dimension divided by its deviation; `phi_s`: the equation above. Its buffers are saved with the
    run. They are filled by `Moments.fit`, or by a saved state.
    """

    mean: Tensor
    scale: Tensor
    """1 / deviation (C) of `dimension`; H Uᵀ / (√C φ) (C, C) of `phi_s`."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.ready = False
        """Whether the buffers hold statistics. The engine sets it for a state and for a rehearsal."""
        rotates = kind == "phi_s"
        if rotates and hadamard_matrix(width) is None:
            raise TransferError(
                f"transfer.standardize=phi_s needs a Hadamard matrix of the width of the teacher's features, and "
                f"none is known here for {width}: use dimension"
            )
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.zeros(width, width) if rotates else torch.zeros(width))

    def forward(self, features: Tensor) -> Tensor:
        if not self.ready:
            raise TransferError(
                "transfer.standardize needs statistics of the teacher's features: call DualViT.standardize(batches of "
                "images) before the first step"
            )
        with torch.autocast(features.device.type, enabled=False):
            centered = precise(features) - self.mean
            return centered @ self.scale.T if self.kind == "phi_s" else centered * self.scale


@dataclass(eq=False)
class Measured:
    """What a standardizer is measured on: the features that `read` finds for a batch, of a number of images."""

    standardizer: Standardizer
    images: int
    read: Callable[[tuple[int, int]], Tensor]
    """Function for the teacher's features (B, ..., C) of the last images, given their size (height, width)."""


class Moments:
    """The mean and the covariance of a teacher's features, summed in float64."""

    def __init__(self, measured: Measured) -> None:
        self.measured = measured
        self._seen = self._count = 0
        self._sum: Tensor | float = 0.0
        self._products: Tensor | float = 0.0

    @property
    def full(self) -> bool:
        """Whether all images are seen."""
        return self._seen >= self.measured.images

    def add(self, images: Tensor) -> None:
        """Add the features of a batch that the teacher has just seen, up to the number of images."""
        kept = min(len(images), self.measured.images - self._seen)
        size = int(images.shape[-2]), int(images.shape[-1])
        features = self.measured.read(size)[:kept].flatten(0, -2).double()
        self._sum = self._sum + features.sum(0)
        self._products = self._products + features.T @ features
        self._seen, self._count = self._seen + kept, self._count + len(features)

    def fit(self) -> None:
        """Give the standardizer its mean and scale.

        Raises TransferError: the features are not finite, or they are the same for all images.
        """
        if isinstance(self._sum, float) or isinstance(self._products, float):
            raise TransferError("transfer.standardize needs training images: the training set is empty")
        mean = (self._sum / self._count).cpu()
        covariance = (self._products / self._count).cpu() - torch.outer(mean, mean)
        standardizer = self.measured.standardizer
        if covariance.diagonal().max() <= 1e-12 * mean.square().max():  # rounding alone
            raise TransferError(
                "transfer.standardize: the teacher gives the same features for all images; use another teacher, or "
                "more transfer.standardize_images"
            )
        scale = _scales(covariance, rotates=standardizer.kind == "phi_s")
        standardizer.mean.copy_(mean)
        standardizer.scale.copy_(scale)
        standardizer.ready = True


def _scales(covariance_CC: Tensor, *, rotates: bool) -> Tensor:
    """Return 1 / deviation (C), or the rotation of PHI-S over its φ (C, C)."""
    variance = covariance_CC.diagonal().clamp(min=0)
    if not covariance_CC.isfinite().all():
        raise TransferError(
            "transfer.standardize: a feature of the teacher is not finite on the training images; with "
            "teacher.dtype=fp16 use bf16"
        )
    if not rotates:
        # A dimension that does not change stays as it is: its deviation is rounding.
        constant = variance <= 1e-12 * variance.max()
        return torch.where(constant, torch.ones_like(variance), variance).rsqrt()
    eigenvectors = torch.linalg.eigh(covariance_CC).eigenvectors
    hadamard = hadamard_matrix(len(variance))
    assert hadamard is not None  # the standardizer was made
    rotation: Tensor = hadamard @ eigenvectors.T
    return rotation / (len(variance) * variance.mean()).sqrt()


def mark_ready(module: nn.Module, *, like: nn.Module | None = None) -> None:
    """Note that the standardizers within a module hold statistics: those of `like`, or of a state that was restored."""
    mine = [each for each in module.modules() if isinstance(each, Standardizer)]
    theirs = mine if like is None else [each for each in like.modules() if isinstance(each, Standardizer)]
    for own, other in zip(mine, theirs, strict=True):
        own.load_state_dict(other.state_dict())
        own.ready = like is None or other.ready


@torch.no_grad()
def fit(
    measured: Sequence[Measured],
    batches: Iterable[Batch],
    shown: Callable[..., AbstractContextManager[None]],
) -> None:
    """Fit standardizers to batches of images; within `shown` the teachers have seen a batch."""
    moments = [Moments(each) for each in measured]
    for batch in batches:
        waiting = [each for each in moments if not each.full]
        if not waiting:
            break
        images, *beside = batch if isinstance(batch, tuple | list) and batch else (batch,)
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise DataError(
                f"batches holds {kind_of(batch)}: a batch is its images (B, C, H, W), or a tuple of these and labels"
            )
        with shown(images, *(each for each in beside if isinstance(each, Mapping))):
            for each in waiting:
                each.add(images)
    for each in moments:
        each.fit()
