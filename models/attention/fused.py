"""Softmax attention and its by-products without forming the N x N map.

With P = softmax(s Q Kᵀ + bias) and lse its row-wise log-sum-exp, three operators cover every transfer loss:

* `attention_with_lse`: P V and lse, both differentiable;
* `apply_map`: P V, differentiable only in V (the map belongs to a frozen teacher);
* `map_logsumexp`: lse only, differentiable in Q and K.

Each runs on torch's own fused kernels. Two identities make the backward passes fit these kernels:

* The gradient of lse with respect to the logits is P, so an upstream gradient g of lse adds g to dP inside
  dS = P * (dP - D + g). The module `fold` makes a kernel for the gradient of P V compute it.
* Pᵀ G is itself an attention with queries K, keys Q, values G and a bias of -lse on each key. Its softmax is over the
  wrong axis; multiplying by its row sums corrects this. One forward kernel replaces a backward.

Shape suffixes: B batch, H heads, M query rows, N keys, D head width.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels

NAMESPACE = re.sub(r"\W", "_", __name__.removesuffix(".models.attention.fused"))
"""Of the operators: `graftvit`. A student's own file has another, so that a process may have several of both."""


def attention_with_lse(
    q_BHMD: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return P V (B, H, M, D) and lse (B, H, M) in float32 (float64 for float64 inputs)."""
    q_BHMD, k_BHND, v_BHND, bias = kernels.same_dtype(q_BHMD, k_BHND, v_BHND, bias)
    return _attention_with_lse(q_BHMD, k_BHND, v_BHND, bias, scale)


def apply_map(
    q_BHMD: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Return P V (B, H, M, D), with a gradient only for V; Q, K and bias are constants."""
    q_BHMD, k_BHND, v_BHND, bias = kernels.same_dtype(q_BHMD, k_BHND, v_BHND, bias)
    width, key_width = v_BHND.shape[-1], k_BHND.shape[-1]
    if width < key_width:  # the kernels need one head width
        v_BHND = F.pad(v_BHND, (0, key_width - width))
    elif width > key_width:
        q_BHMD = F.pad(q_BHMD, (0, width - key_width))
        k_BHND = F.pad(k_BHND, (0, width - key_width))
    q_BHMD, k_BHND, bias = q_BHMD.detach(), k_BHND.detach(), None if bias is None else bias.detach()
    out: Tensor
    if torch.compiler.is_exporting():  # an exported file cannot contain our operators
        out = F.scaled_dot_product_attention(q_BHMD, k_BHND, v_BHND, bias, scale=scale)
    else:
        out = _apply_map(q_BHMD, k_BHND, v_BHND, bias, scale)[0]
    return out[..., :width]


def map_logsumexp(q_BHMD: Tensor, k_BHND: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Return the log-sum-exp of each row of s Q Kᵀ + bias, (B, H, M), in float32 (float64 for float64 inputs)."""
    q_BHMD, k_BHND, _, bias = kernels.same_dtype(q_BHMD, k_BHND, k_BHND, bias)
    if bias is not None and bias.requires_grad:
        return attention_with_lse(q_BHMD, k_BHND, k_BHND.detach(), scale, bias)[1]
    return _map_logsumexp(q_BHMD, k_BHND, bias, scale)[0]


# The operators. Each is opaque to torch.compile, so the compiled step runs the same kernels as the eager one.


@torch.library.custom_op(f"{NAMESPACE}::attention_with_lse", mutates_args=())
def _attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return kernels.forward(q, k, v, bias, scale)


@torch.library.custom_op(f"{NAMESPACE}::attention_with_lse_backward", mutates_args=())
def _attention_with_lse_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if bias_grad and bias is not None:
        return kernels.backward_with_bias(grad_out, grad_lse, q, k, v, bias, out, lse, scale)
    gradients = kernels.backward(grad_out, q, k, v, bias, out, lse, scale, grad_lse)
    dq, dk, dv = (kernels.by_token(x) for x in gradients)
    return dq, dk, dv, q.new_empty(0)


@torch.library.custom_op(f"{NAMESPACE}::apply_map", mutates_args=())
def _apply_map(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return kernels.forward(q, k, v, bias, scale)


@torch.library.custom_op(f"{NAMESPACE}::apply_map_backward", mutates_args=())
def _apply_map_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    if kernels.has_transposed(q, bias):
        dv = kernels.transposed_map(q, k, grad_out, lse, scale)
    else:
        dv = kernels.backward(grad_out, q, k, v, bias, out, lse, scale)[2]
    return kernels.by_token(dv)


@torch.library.custom_op(f"{NAMESPACE}::map_logsumexp", mutates_args=())
def _map_logsumexp(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    mean_key, lse = kernels.forward(q, k, k, bias, scale)
    return lse, mean_key


@torch.library.custom_op(f"{NAMESPACE}::map_logsumexp_backward", mutates_args=())
def _map_logsumexp_backward(
    grad_lse: Tensor, q: Tensor, k: Tensor, bias: Tensor | None, lse: Tensor, mean_key: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    # d lse / d q = s P K, which the forward pass computed; d lse / d k = s Pᵀ (g q).
    grad = (scale * grad_lse[..., None]).to(q.dtype)
    weighted = grad * q
    if kernels.has_transposed(q, bias):
        dk = kernels.transposed_map(q, k, weighted, lse, scale)
    else:
        dk = kernels.backward(weighted, q, k, k, bias, mean_key, lse, scale)[2]
    return kernels.by_token(grad * mean_key), kernels.by_token(dk)


# Shapes for tracing.


@_attention_with_lse.register_fake
@_apply_map.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return kernels.empty_by_token(q), kernels.empty_lse(q)


@_map_logsumexp.register_fake
def _(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return kernels.empty_lse(q), kernels.empty_by_token(q)


@_attention_with_lse_backward.register_fake
def _(grad_out, grad_lse, q, k, v, bias, out, lse, scale, bias_grad):  # type: ignore[no-untyped-def]
    grad_bias = q.new_empty(bias.shape) if bias_grad and bias is not None else q.new_empty(0)
    dq, dk, dv = (kernels.empty_by_token(x) for x in (q, k, v))
    return dq, dk, dv, grad_bias


@_apply_map_backward.register_fake
def _(grad_out, q, k, v, bias, out, lse, scale):  # type: ignore[no-untyped-def]
    return kernels.empty_by_token(v)


@_map_logsumexp_backward.register_fake
def _(grad_lse, q, k, bias, lse, mean_key, scale):  # type: ignore[no-untyped-def]
    return kernels.empty_by_token(q), kernels.empty_by_token(k)


# Gradients.


def _save_attention(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, bias, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bias, *output)


def _attention_with_lse_gradient(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, bias, out, lse = ctx.saved_tensors
    bias_grad = ctx.needs_input_grad[3]
    dq, dk, dv, db = _attention_with_lse_backward(
        grad_out, grad_lse, q, k, v, bias, out, lse, ctx.scale, bias_grad
    )
    return dq, dk, dv, db if bias_grad else None, None


def _apply_map_gradient(ctx, grad_out, _):  # type: ignore[no-untyped-def]
    q, k, v, bias, out, lse = ctx.saved_tensors
    return None, None, _apply_map_backward(grad_out, q, k, v, bias, out, lse, ctx.scale), None, None


def _save_logsumexp(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, bias, ctx.scale = inputs
    ctx.save_for_backward(q, k, bias, *output)


def _map_logsumexp_gradient(ctx, grad_lse, _):  # type: ignore[no-untyped-def]
    q, k, bias, lse, mean_key = ctx.saved_tensors
    return *_map_logsumexp_backward(grad_lse, q, k, bias, lse, mean_key, ctx.scale), None, None


torch.library.register_autograd(
    f"{NAMESPACE}::attention_with_lse", _attention_with_lse_gradient, setup_context=_save_attention
)
torch.library.register_autograd(f"{NAMESPACE}::apply_map", _apply_map_gradient, setup_context=_save_attention)
torch.library.register_autograd(
    f"{NAMESPACE}::map_logsumexp", _map_logsumexp_gradient, setup_context=_save_logsumexp
)
