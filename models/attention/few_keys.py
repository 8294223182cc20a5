"""Softmax attention of many queries to few keys, with a learned bias of each key.

torch's fused kernels have no gradient for a bias: where one is needed, torch forms the maps. Here the map of one chunk
of queries exists at a time, in the cache of a CPU, and everything that scales a row or a column of it scales queries,
keys, values or outputs, which are narrower. With E = exp(s Q Kᵀ - row maxima), c = exp(bias) and z = E c, the output
is O = (E (c ∘ V)) / z. With the upstream gradient G, u = G / z and w = rowsum(u ∘ O), the gradient for the logits is

    dS = E ∘ (u (c ∘ V)ᵀ - w cᵀ),   so dQ = s dS K, dK = s dSᵀ Q, dV = c ∘ (Eᵀ u), and that for the bias is colsum(dS).

Shape suffixes: B batch, H heads, N queries, n queries of a chunk, M keys, D head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    if _takes_chunks(q_BHND, k_BHMD, v_BHMD, bias_M):
        learned: Tensor = _FewKeys.apply(q_BHND, k_BHMD, v_BHMD, bias_M, scale)
        return learned
    bias = bias_M.to(q_BHND.dtype)[None, None, None]
    return F.scaled_dot_product_attention(q_BHND, k_BHMD, v_BHMD, attn_mask=bias, scale=scale)


class _Chunk(NamedTuple):
    """Some queries of one image."""

    image: slice
    queries: slice

    def of(self, x_BHND: Tensor) -> Tensor:
        """Return a view of these queries, (1, H, n, D)."""
        return x_BHND[self.image, :, self.queries]


class _FewKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias_M: Tensor, scale: float) -> Tensor:
        counts_M1, maps, kept = _counts(bias_M), [], _keeps_maps(q, k)
        scaled_k, weighted_v = k * scale, v * counts_M1
        out, z_BHN1 = torch.empty_like(q), q.new_empty(*q.shape[:3], 1)
        for chunk in _chunks(q, k.shape[2]):
            weights_BHnM = _weights(chunk.of(q), scaled_k[chunk.image])
            z = chunk.of(z_BHN1).copy_(weights_BHnM @ counts_M1)
            torch.div(weights_BHnM @ weighted_v[chunk.image], z, out=chunk.of(out))
            if kept:
                maps.append(weights_BHnM)
        ctx.save_for_backward(q, k, v, bias_M, out, z_BHN1, *maps)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias_M, out, z_BHN1, *maps = ctx.saved_tensors
        counts_M1 = _counts(bias_M)
        scaled_k, weighted_v = k * ctx.scale, v * counts_M1
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_bias = torch.zeros_like(bias_M)
        for index, chunk in enumerate(_chunks(q, k.shape[2])):
            one, some_q = chunk.image, chunk.of(q)
            weights_BHnM = maps[index] if maps else _weights(some_q, scaled_k[one])
            u = chunk.of(grad_out) / chunk.of(z_BHN1)
            w = (u * chunk.of(out)).sum(3, keepdim=True)
            grad_logits = u @ weighted_v[one].mT
            grad_logits.addcmul_(w, counts_M1.mT, value=-1).mul_(weights_BHnM)
            torch.matmul(grad_logits, scaled_k[one], out=chunk.of(dq))
            dk[one] += grad_logits.mT @ some_q
            dv[one] += weights_BHnM.mT @ u
            grad_bias += grad_logits.sum((0, 1, 2))
        return dq, dk.mul_(ctx.scale), dv.mul_(counts_M1), grad_bias, None


def _weights(q_BHnD: Tensor, scaled_k_BHMD: Tensor) -> Tensor:
    """Return E, (B, H, n, M)."""
    logits: Tensor = q_BHnD @ scaled_k_BHMD.mT
    return logits.sub_(logits.amax(3, keepdim=True)).exp_()


def _counts(bias_M: Tensor) -> Tensor:
    """Return c (M, 1) up to a factor, which cancels."""
    return (bias_M - bias_M.max()).exp_()[:, None]


def _takes_chunks(q: Tensor, k: Tensor, v: Tensor, bias_M: Tensor) -> bool:
    """Return whether the bias needs a gradient, and inputs and surroundings are those that `_FewKeys` takes."""
    learned = torch.is_grad_enabled() and bias_M.requires_grad
    plain = learned and q.device.type == "cpu" and k.shape == v.shape and not torch.is_autocast_enabled("cpu")
    plain = plain and q.dtype == k.dtype == v.dtype == bias_M.dtype and kernels.precise(q) is q
    return plain and not torch.compiler.is_compiling()


def _keeps_maps(q_BHND: Tensor, k_BHMD: Tensor) -> bool:
    """Return whether the maps are small: twice as wide as the queries, or one chunk."""
    keys = k_BHMD.shape[2]
    return keys <= 2 * q_BHND.shape[3] or q_BHND.shape[:3].numel() * keys <= CACHED


def _chunks(q_BHND: Tensor, keys: int) -> list[_Chunk]:
    batch, heads, tokens, _ = q_BHND.shape
    length = max(1, CACHED // (heads * keys))
    return [
        _Chunk(slice(image, image + 1), slice(start, min(start + length, tokens)))
        for image in range(batch)
        for start in range(0, tokens, length)
    ]
