"""Rows of the Jacobian, in place of rows of the map for operators that are not linear in V."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import AttentionOperator, Heads


def jacobian_rows(operator: AttentionOperator, heads: Heads, index: Tensor) -> Tensor:
    """Return mean_c ∂o_ic / ∂v_jc for the queries `index` (S,) and all tokens j: (B, H, S, N), without gradient.

    For an operator that is linear in V these are the rows of its map. Exact, by S D backward passes. Each pass serves
    all images and heads, because no image or head sees the values of another.
    """
    q, k, values = heads.qkv()
    with torch.enable_grad():
        v_BHND = values.detach().requires_grad_()
        out_BHND = operator.attend(heads.with_qkv(q.detach(), k.detach(), v_BHND))
        rows = [_row(out_BHND[:, :, token], v_BHND) for token in index.tolist()]
    if not rows:
        return values.new_zeros(*values.shape[:2], 0, values.shape[2])
    return torch.stack(rows, 2)


def _row(out_BHD: Tensor, v_BHND: Tensor) -> Tensor:
    """Return the row of one query, (B, H, N)."""
    width = out_BHD.shape[-1]
    row = torch.zeros(v_BHND.shape[:3], dtype=v_BHND.dtype, device=v_BHND.device)
    for channel in range(width):
        (gradient,) = torch.autograd.grad(out_BHD[..., channel].sum(), v_BHND, retain_graph=True)
        row += gradient[..., channel]
    return row / width
