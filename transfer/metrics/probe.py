"""A linear probe: multinomial logistic regression on the features of a frozen model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .ranks import exact, first

STRENGTHS = tuple(10.0**power for power in range(-6, 6))
"""Values of C that are tried: the range of DINOv2's evaluation, one a decade instead of four."""
HELD_OUT = 10
"""One in so many training images chooses C."""
MAX_STEPS = 1000
TOLERANCE = 1e-6
"""Of the loss's gradient: its largest entry."""


@dataclass(frozen=True)
class LinearProbe:
    """`probe(features)` gives logits (B, classes). `strength` is the C that was chosen."""

    weight: Tensor
    bias: Tensor
    strength: float

    def __call__(self, features_BD: Tensor) -> Tensor:
        return F.linear(features_BD.to(self.weight.dtype), self.weight, self.bias)


def fit_probe(features_ND: Tensor, labels_N: Tensor, num_classes: int) -> LinearProbe:
    """Return the probe of DINOv2's evaluation (arXiv:2304.07193): L-BFGS on the features as they are, in float64.

    It minimizes Σ_i CE(W f_i + b, y_i) + ‖W‖² / (2C). C is the one of `STRENGTHS` that names the most images right
    of a tenth of the training images, drawn at random, when fitted on the rest; the probe is then fitted on all.
    """
    features_ND = features_ND.to(exact(features_ND.device))
    # Off the mean and of one scale L-BFGS is faster, and the minimum is the same: the bias takes the one up and the
    # penalty, which then counts (scale)^-2 as much, the other.
    mean_D, scale = features_ND.mean(0), float(features_ND.std(correction=0)) or 1.0
    features_ND = (features_ND - mean_D) / scale
    order = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(0)).to(labels_N.device)
    chosen, rest = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    strength = STRENGTHS[len(STRENGTHS) // 2]
    if len(chosen):
        held = features_ND[chosen], labels_N[chosen]
        strength = _choose(features_ND[rest], labels_N[rest], held, num_classes, scale)
    weight, bias = _start(features_ND, num_classes)
    _fit((weight, bias), features_ND, labels_N, strength * scale**2)
    weight = weight.detach() / scale
    return LinearProbe(first(weight), first(bias.detach() - weight @ mean_D), strength)


def _choose(
    features_ND: Tensor, labels_N: Tensor, held: tuple[Tensor, Tensor], num_classes: int, scale: float
) -> float:
    """Return the strength with the most held-out images right, the least of equals; each fit starts from the one
    before."""
    parameters = _start(features_ND, num_classes)
    right = []
    for strength in STRENGTHS:
        _fit(parameters, features_ND, labels_N, strength * scale**2)
        with torch.no_grad():
            right.append((F.linear(held[0], *parameters).argmax(1) == held[1]).sum())
    return STRENGTHS[int(first(torch.stack(right)).argmax())]


def _start(features_ND: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    weight = features_ND.new_zeros(num_classes, features_ND.shape[1]).requires_grad_()
    return weight, features_ND.new_zeros(num_classes).requires_grad_()


@torch.enable_grad()
def _fit(parameters: tuple[Tensor, Tensor], features_ND: Tensor, labels_N: Tensor, strength: float) -> None:
    """Bring weight and bias to the minimum, divided by the number of images to keep the gradient's scale."""
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=MAX_STEPS,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = parameters[0].square().sum() / (2 * strength * len(labels_N))
        total = F.cross_entropy(F.linear(features_ND, *parameters), labels_N) + penalty
        total.backward()
        return total

    optimizer.step(loss)
