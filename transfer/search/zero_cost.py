"""Scores of a program on recorded layers that need neither a fit nor a training; higher is meant to be better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from ...models.programs.program import Program
from .matching import RecordedLayer, raw_error


@torch.no_grad()
def unfitted(program: Program, layers: Sequence[RecordedLayer]) -> float:
    """Return the negative mean over layers and heads of ‖O − T‖ / ‖T − mean(T)‖: the mismatch without least squares."""
    return -fmean(_finite(raw_error(_output(program, each), each.out), math.inf) for each in layers)


@torch.no_grad()
def rank(program: Program, layers: Sequence[RecordedLayer]) -> float:
    """Return the mean over layers and heads of the effective rank of the outputs' covariance, from 1 to D.

    exp(−Σ p log p), where p are the eigenvalues divided by their sum (Roy and Vetterli, EUSIPCO 2007).
    """
    return fmean(_effective_rank(_output(program, each)) for each in layers)


def sensitivity(program: Program, layers: Sequence[RecordedLayer]) -> float:
    """Return the mean over layers of log Σ |x ∂E/∂x|, where x are Q, K and V, and E is the error without a fit.

    It is the saliency of SNIP (ICLR 2019), of the inputs in place of weights. −∞: one is not finite, or all are 0.
    """
    return fmean(_saliency(program, each) for each in layers)


SCORES: Mapping[str, Callable[[Program, Sequence[RecordedLayer]], float]] = {
    "unfitted": unfitted,
    "rank": rank,
    "sensitivity": sensitivity,
}
"""Scores by name, beside the mismatches of `program_search.PROXIES`."""


def _output(program: Program, layer: RecordedLayer) -> Tensor:
    return program(q=layer.q, k=layer.k, v=layer.v)


def _effective_rank(out_BHND: Tensor) -> float:
    rows = out_BHND.transpose(0, 1).flatten(1, 2).double()
    if not rows.isfinite().all():
        return 0.0
    centered = rows - rows.mean(1, keepdim=True)
    values = torch.linalg.eigvalsh(centered.transpose(1, 2) @ centered).clamp_min(0)
    parts = values / values.sum(1, keepdim=True).clamp_min(1e-30)
    return float(torch.special.entr(parts).sum(1).exp().mean())


def _saliency(program: Program, layer: RecordedLayer) -> float:
    inputs = {name: getattr(layer, name).clone().requires_grad_() for name in program.inputs}
    gradients = torch.autograd.grad(
        raw_error(program(**inputs), layer.out), list(inputs.values()), allow_unused=True
    )
    pairs = zip(inputs.values(), gradients, strict=True)
    total = sum(float((x * g).detach().abs().sum()) for x, g in pairs if g is not None)
    return math.log(total) if _finite(total, 0.0) > 0 else -math.inf


def _finite(value: Tensor | float, otherwise: float) -> float:
    number = float(value)
    return number if math.isfinite(number) else otherwise
