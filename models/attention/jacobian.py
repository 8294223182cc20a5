"""Rows of the Jacobian, in place of rows of the map for operators that are not linear in V."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import AttentionOperator, Heads


def jacobian_rows(operator: AttentionOperator, heads: Heads, index: Tensor) -> Tensor:
    """Return mean_c ∂o_ic / ∂v_jc for the queries `index` (S,) and all tokens j: (B, H, S, N), without gradient.

    For an operator that is linear in V these are the rows of its map. i and j are tokens of one head. Exact, by S D
    backward passes, each of which serves all images and heads; by S D H passes where heads see each other's values.
    """
    values = heads.values()
    with torch.enable_grad():
        v_BHND = values.detach().requires_grad_()
        inputs = heads.each(Tensor.detach, heads.bias)
        inputs.v = v_BHND
        out_BHND = operator.attend(inputs)
        groups = [slice(None)]
        if not operator.traits.independent_heads:
            groups = [slice(head, head + 1) for head in range(values.shape[1])]
        if not out_BHND.requires_grad:  # the operator does not read the values
            return torch.zeros_like(values[:, :, :1, :1]).expand(-1, -1, len(index), values.shape[2])
        rows = [
            torch.cat([_row(out_BHND[:, group, token], v_BHND, group) for group in groups], 1)
            for token in index.tolist()
        ]
    if not rows:
        return values.new_zeros(*values.shape[:2], 0, values.shape[2])
    return torch.stack(rows, 2)


def _row(out_BHD: Tensor, v_BHND: Tensor, heads: slice) -> Tensor:
    """Return the row of one query in the heads of `out_BHD`, which are `heads` of V: (B, H, N)."""
    width = out_BHD.shape[-1]
    row = torch.zeros_like(v_BHND[:, heads, :, 0])
    for channel in range(width):
        (gradient,) = torch.autograd.grad(
            out_BHD[..., channel].sum(), v_BHND, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        row += gradient[:, heads, :, channel]
    return row / width
