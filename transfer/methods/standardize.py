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
from ...models.errors import TransferError
from .hadamard import hadamard_matrix

Batch = Tensor | tuple[Tensor, Mapping[str, Tensor]]
"""Images, or images and what the teachers gave for them before."""


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
    """Gives the teacher's features (B, ..., C) for images of a size (height, width) that it has just seen."""


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
        images, *taught = (batch,) if isinstance(batch, Tensor) else batch
        with shown(images, *taught):
            for each in waiting:
                each.add(images)
    for each in moments:
        each.fit()
