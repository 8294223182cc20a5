"""How well a program takes over a teacher's attention: measured on recorded inputs of its layers, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ...models.attention.base import Geometry, without_prefix
from ...models.attention.softmax import SoftmaxAttention
from ...models.converted import converted_layers
from ...models.errors import TransferError, counted
from ...models.families import evaluating, sites, vit
from ...models.grid_hosts import Call, release_layers, watch_layer
from ...models.host import AttentionHost
from ...models.programs.primitives import Polynomial
from ...models.programs.program import Program

RIDGE = 1e-6
"""Of the least squares, relative to the squared size of each column."""
DIGITS = 3
"""Significant digits of a score, so that it is the same on every machine."""


@dataclass(frozen=True)
class RecordedLayer:
    """The projections and the output of a teacher's attention at its grid tokens, each (B, H, N, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor

    @property
    def size(self) -> str:
        """Return the norms of the tensors to two digits, which tell teachers apart and machines not."""
        return " ".join(f"{float(x.norm()):.2g}" for x in (self.q, self.k, self.v, self.out))

    def cost(self, polynomial: Polynomial) -> int:
        """Return the value of a cost of one head, for all heads."""
        return self.q.shape[1] * polynomial.at(*self.q.shape[2:])


@torch.no_grad()
def record_layers(teacher: nn.Module, images: Tensor) -> list[RecordedLayer]:
    """Run `teacher` on images (B, C, H, W) and record each layer.

    Raises TransferError: there is only one image, and half of them are for fitting; or a layer has lost its softmax.
    """
    if len(images) < 2:
        raise TransferError(
            f"{counted(len(images), 'image')}: give 2 or more, half to fit and half to measure"
        )
    for index, layer in converted_layers(teacher).items():
        if not isinstance(layer.operator, SoftmaxAttention):
            raise TransferError(
                f"layer {index} of the teacher has {layer.choice} in place of softmax attention: search with the model "
                "from which it was converted"
            )
    layers: list[RecordedLayer] = []

    def see(geometry: Geometry, native: AttentionHost, call: Call) -> None:
        heads = native.heads_of(*call.inputs, **call.keywords)
        found = (*heads.qkv(), native.attend(heads))
        layers.append(RecordedLayer(*(without_prefix(x, geometry).float() for x in found)))

    places = [site for site in sites(teacher) if site.num_heads]
    hooks = [watch_layer(teacher, site, partial(see, site.shape.geometry)) for site in places]
    try:
        with evaluating(teacher):
            vit(teacher).forward_features(images.to(next(teacher.parameters())))
    finally:
        for hook in hooks:
            hook.remove()
        release_layers(teacher)
    return layers


@torch.no_grad()
def mismatch(program: Program, layers: Sequence[RecordedLayer]) -> float:
    """Return the mean over layers and heads of ‖O W − T‖ / ‖T − mean(T)‖, where T is the teacher's output.

    O is the program's output with a column of ones. W is fitted for each head by least squares on the first half of the
    images, as a student's value and output projections can learn it, and the error is that of the second half. 1 is
    the error of a constant. Infinity: the program's outputs are not finite.
    """
    return rounded([layer_mismatch(program(q=each.q, k=each.k, v=each.v), each.out) for each in layers])


def rounded(errors: Sequence[Tensor]) -> float:
    """Return the mean over layers to three digits; infinity if it is not finite."""
    error = float(torch.stack(list(errors)).mean())
    return float(f"{error:.{DIGITS}g}") if error == error and error < 1e6 else float("inf")


def layer_mismatch(out: Tensor, wanted: Tensor) -> Tensor:
    """Fit on the first half of the images; return the mean error of the heads on the second half."""
    if not out.isfinite().all():
        return torch.tensor(torch.inf, dtype=torch.float64)
    half = len(out) // 2
    weights = _least_squares(_with_ones(out[:half]), _rows(wanted[:half]))
    return _relative_error(_with_ones(out[half:]) @ weights, _rows(wanted[half:]))


def matching_error(out: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean error of the heads on the images of the fit, with gradients."""
    rows, targets = _with_ones(out), _rows(wanted)
    return _relative_error(rows @ _least_squares(rows, targets), targets)


def raw_error(out: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean error of the heads without a fit, with gradients."""
    return _relative_error(_rows(out), _rows(wanted))


def _relative_error(found: Tensor, targets: Tensor) -> Tensor:
    left = (found - targets).flatten(1).norm(dim=1)
    spread = (targets - targets.mean(1, keepdim=True)).flatten(1).norm(dim=1)
    errors: Tensor = left / spread.clamp_min(1e-12)
    return errors.mean()


def _rows(x_BHND: Tensor) -> Tensor:
    """Return all tokens of a head, (H, B N, D), in float64."""
    return x_BHND.transpose(0, 1).flatten(1, 2).double()


def _with_ones(x_BHND: Tensor) -> Tensor:
    """Return the rows and a column of ones, (H, B N, D + 1)."""
    rows = _rows(x_BHND)
    return torch.cat((rows, torch.ones_like(rows[..., :1])), 2)


def _least_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return W (H, D + 1, D) with the smallest ‖O W − T‖² + ridge."""
    gram = outputs.transpose(1, 2) @ outputs
    scale = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
    ridge = torch.diag_embed(RIDGE * scale)
    weights: Tensor = torch.linalg.solve(gram + ridge, outputs.transpose(1, 2) @ targets)
    return weights
