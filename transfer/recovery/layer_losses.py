"""What a converted layer is pulled towards, given the projections of the teacher's layer and its own.

Each loss takes the operator, the student's heads and what the teacher's layer does, and gives a float32 scalar: a mean
over images and heads. No N x N map is formed, save the few rows that `rows` samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.attention.base import AttentionOperator, Heads
from ...models.attention.fused import apply_map
from ...models.attention.kernels import precise
from ...models.attention.softmax import softmax_rows
from ...models.errors import TransferError, did_you_mean
from .map_distance import squared_distance

NUM_PROBES = 8
NUM_ROWS = 32
SMALLEST = 1e-12
"""No probability is taken to be smaller, so that the logarithm of a key out of reach is finite."""


class LayerTarget(NamedTuple):
    """What a layer of the teacher does on a batch."""

    heads: Heads
    """Its projections, without gradients."""
    output: Tensor
    """Its output (B, H, N, D) before the output projection: A_t V_t, within windows or of reduced keys as in timm."""


LayerLoss = Callable[[AttentionOperator, Heads, LayerTarget], Tensor]


def output_error(operator: AttentionOperator, student: Heads, teacher: LayerTarget) -> Tensor:
    """Mean squared error of the layer's output to A_t V_t, per head and before the output projection.

    The loss of LoLCATs (arXiv 2410.10254); the only one for operators that are not linear in V.
    """
    return F.mse_loss(precise(operator(student)), precise(teacher.output.detach()))


def map_error(operator: AttentionOperator, student: Heads, teacher: LayerTarget) -> Tensor:
    """‖A_t − A_s‖²_F / N, exact: the loss of MOHAWK (arXiv 2408.10189) without its maps."""
    terms = operator.terms(student)
    return squared_distance(teacher.heads, terms).mean() / teacher.heads.known.shape[2]


def probe_error(operator: AttentionOperator, student: Heads, teacher: LayerTarget) -> Tensor:
    """‖(A_t − A_s) P‖²_F / (r N) with fresh P ∈ {±1}^(N x r): an unbiased estimate of `map_error`."""
    q, k, v = teacher.heads.qkv()
    shape = (1, 1, q.shape[2], NUM_PROBES)
    signs = torch.randint(0, 2, shape, device=q.device).to(q.dtype).mul(2).sub(1)
    probes = signs.expand(*q.shape[:2], -1, -1)
    target = apply_map(q, k, probes, teacher.heads.scale, teacher.heads.bias)
    out = operator.attend(student.with_values(probes.to(v.dtype)))
    error = (precise(out) - precise(target)).square().sum((2, 3)).mean()
    return error / (NUM_PROBES * q.shape[2])


def row_error(operator: AttentionOperator, student: Heads, teacher: LayerTarget) -> Tensor:
    """Return cross-entropy of sampled rows of the student's map to the teacher's: of all prefix tokens and of random
    patches, fresh each step. The loss of Hedgehog (arXiv 2402.04347), on a sample."""
    tokens = teacher.heads.known.shape[2]
    prefix = 0 if student.geometry is None else student.geometry.num_prefix
    device = teacher.heads.known.device
    patches = torch.randperm(tokens - prefix, device=device)[: max(1, NUM_ROWS - prefix)] + prefix
    index = torch.cat([torch.arange(prefix, device=device), patches])
    target = softmax_rows(teacher.heads, index).detach()
    rows = precise(operator.rows(student, index)).clamp_min(SMALLEST)
    return -(target * rows.log()).sum(-1).mean()


LAYER_LOSSES: dict[str, LayerLoss] = {
    "output": output_error,
    "map": map_error,
    "probes": probe_error,
    "rows": row_error,
}


def check_layer_loss(
    name: str, layer: int, choice: str, operator: AttentionOperator, *, whole_maps: bool = True
) -> None:
    """Raise TransferError if the loss does not exist, or the layer of the student or of the teacher has no such thing.

    `whole_maps` says that the teacher's layer has a map of all pairs of tokens, without windows or reduced keys.
    """
    if name not in LAYER_LOSSES:
        raise TransferError(f"align.match={name}; {did_you_mean(name, LAYER_LOSSES)}")
    if name != "output" and not whole_maps:
        raise TransferError(
            f"align.match={name}: layer {layer} of the teacher has windows, reduced keys or a relative position bias, "
            "and so no map of all pairs of tokens to compare; use output"
        )
    traits = operator.traits
    if name != "output" and not traits.linear_in_v:
        why = f" ({operator.why_no_map})" if operator.why_no_map else ""
        raise TransferError(
            f"align.match={name}: {choice} of layer {layer} is not linear in V and has no map{why}; use output"
        )
    if name == "rows" and not (traits.nonnegative and traits.row_stochastic):
        raise TransferError(
            f"align.match=rows: the rows of {choice} in layer {layer} are no distributions, so they have no "
            "cross-entropy; use output, map or probes"
        )


def can_learn(name: str, operator: AttentionOperator) -> bool:
    """Return whether a parameter changes the loss; only `output` depends on values, the map of `uniform` on nothing."""
    return (
        name == "output"
        or not {"q", "k"}.isdisjoint(operator.needs)
        or any(True for _ in operator.parameters())
    )
