"""Softmax attention of many queries to few keys, with a learned bias of each key.

torch's fused kernels have no gradient for a bias: where one is needed, torch forms the maps. Here the backward pass
forms the map of one chunk of queries at a time.

Shape suffixes: B batch, H heads, N queries, n queries of a chunk, M keys, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels

CACHED = 3 * 2**16
"""The number of weights of the map in a chunk, which stays in the cache of a CPU."""


def few_keys_attention(
    q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, bias_M: Tensor, scale: float
) -> Tensor:
    """Return softmax(s Q Kᵀ + bias) V, (B, H, N, D)."""
    learned = torch.is_grad_enabled() and bias_M.requires_grad
    learned = learned and q_BHND.shape[:3].numel() * len(bias_M) > CACHED  # else torch's maps are small
    plain = q_BHND.device.type == "cpu" and k_BHMD.shape == v_BHMD.shape
    plain = plain and q_BHND.dtype == k_BHMD.dtype == v_BHMD.dtype == bias_M.dtype
    if learned and plain and kernels.precise(q_BHND) is q_BHND and not _cast_or_compiled():
        out: Tensor = _FewKeys.apply(q_BHND, k_BHMD, v_BHMD, bias_M, scale)
        return out
    bias = bias_M.to(q_BHND.dtype)[None, None, None]
    return F.scaled_dot_product_attention(q_BHND, k_BHMD, v_BHMD, attn_mask=bias, scale=scale)


class _FewKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias_M: Tensor, scale: float) -> Tensor:
        bias = bias_M.expand(*q.shape[:3], -1)
        out, lse_BHN = kernels.forward(q, k, v, bias, scale)
        ctx.save_for_backward(q, k, v, bias_M, out, lse_BHN)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """With dS = P ∘ (G Vᵀ − rowsum(G ∘ O)): dQ = s dS K, dK = s dSᵀ Q, dV = Pᵀ G, and dS summed over queries."""
        q, k, v, bias_M, out, lse_BHN = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_bias = torch.zeros_like(bias_M)
        scaled_k = k * ctx.scale
        for image, start, stop in _chunks(q, k.shape[2]):
            chunk = slice(image, image + 1), slice(None), slice(start, stop)
            one, some_q, some_grad = chunk[0], q[chunk], grad_out[chunk]
            weights_BHnM = some_q @ scaled_k[one].transpose(2, 3)
            weights_BHnM.add_(bias_M).sub_(lse_BHN[chunk][..., None]).exp_()
            dv[one] += weights_BHnM.transpose(2, 3) @ some_grad
            grad_logits = some_grad @ v[one].transpose(2, 3)
            grad_logits.sub_((some_grad * out[chunk]).sum(3, keepdim=True)).mul_(weights_BHnM)
            dq[chunk].copy_(grad_logits @ scaled_k[one])
            dk[one] += grad_logits.transpose(2, 3) @ some_q
            grad_bias += grad_logits.sum((0, 1, 2))
        return dq, dk.mul_(ctx.scale), dv, grad_bias, None


def _chunks(q_BHND: Tensor, keys: int) -> list[tuple[int, int, int]]:
    """Return the image, the first query and the end of each chunk."""
    batch, heads, tokens, _ = q_BHND.shape
    length = max(1, CACHED // (heads * keys))
    starts = range(0, tokens, length)
    return [(image, start, min(start + length, tokens)) for image in range(batch) for start in starts]


def _cast_or_compiled() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
