"""The mismatch of a program after a short fit of its queries, keys and values by gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...models.programs.program import Program
from .matching import RecordedLayer, layer_mismatch, matching_error, rounded

STEPS, LEARNING_RATE = 20, 1e-2


def fitted_mismatch(program: Program, layers: Sequence[RecordedLayer]) -> float:
    """Return the `mismatch` of a program whose inputs have passed affine maps of their own.

    Each of q, k and v becomes x A + b, with A (D, D) and b of each head, as new projections of a student can learn it.
    A and b start at I and 0 and take 20 steps of Adam on the first half of the images; in each step W is the solution
    of the least squares. The error is that of the second half.
    """
    return rounded([_fitted_error(program, layer) for layer in layers])


def _fitted_error(program: Program, layer: RecordedLayer) -> Tensor:
    inputs = {name: getattr(layer, name) for name in program.inputs}
    maps = fit_maps(program, inputs, layer.out)
    with torch.no_grad():
        return layer_mismatch(program(**_mapped(inputs, maps)), layer.out)


def fit_maps(program: Program, inputs: dict[str, Tensor], wanted: Tensor) -> dict[str, Tensor]:
    """Return the maps (H, D + 1, D) with the smallest error on the first half of the images, of all steps."""
    heads, width = wanted.shape[1], wanted.shape[3]
    start = torch.eye(width + 1, width).repeat(heads, 1, 1)
    maps = {name: start.clone().requires_grad_() for name in inputs}
    half = len(wanted) // 2
    seen = {name: x[:half] for name, x in inputs.items()}
    optimizer = torch.optim.Adam(maps.values(), lr=LEARNING_RATE)
    best, least = dict.fromkeys(inputs, start), float("inf")
    for _ in range(STEPS + 1):
        error = matching_error(program(**_mapped(seen, maps)), wanted[:half])
        if not error.isfinite():
            break
        if float(error.detach()) < least:
            best, least = {name: x.detach().clone() for name, x in maps.items()}, float(error.detach())
        optimizer.zero_grad()
        error.backward()
        if not all(x.grad is None or x.grad.isfinite().all() for x in maps.values()):
            break
        optimizer.step()
    return best


def _mapped(inputs: dict[str, Tensor], maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return x A + b for each input (B, H, N, D)."""
    return {name: x @ maps[name][:, :-1] + maps[name][:, -1:] for name, x in inputs.items()}
