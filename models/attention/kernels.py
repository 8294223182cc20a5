"""One interface for torch's fused attention kernels: forward with log-sum-exp, backward, and the transposed map.

CPU: the flash kernel, any dtype. CUDA: flash for half precision without bias, else memory-efficient.
Any other device, or float64 or heads wider than 256 on CUDA: one image at a time, so at most one H x M x N block
exists.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# torch's fused attention kernels of CUDA, given what they accept.

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
WIDEST = 256
Kernel = Literal["flash", "efficient"]


def choose(q: Tensor, bias: Tensor | None) -> Kernel | None:
    """Return the kernel for queries on a GPU, or None if neither takes them."""
    if q.shape[-1] > WIDEST or q.dtype == torch.float64:
        return None
    if is_ampere(q.device.index or 0):
        return "flash" if q.dtype in HALF and bias is None else "efficient"
    return None if q.dtype == torch.bfloat16 else "efficient"


@cache
def is_ampere(index: int) -> bool:
    """Return whether a GPU has compute capability 8.0 or more; without a GPU, a traced one has."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(index) >= (8, 0)


def cuda_forward(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return P V and the log-sum-exp (B, H, M) of the rows."""
    batch, _, rows, width = q.shape
    q, k, v = (_aligned(x) for x in (q, k, v))
    if kernel == "flash":
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    else:
        bias = align_bias(bias, batch)
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)[:2]
    return out[..., :width], lse[..., :rows]


def cuda_backward(
    kernel: Kernel,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> list[Tensor]:
    """Return the gradients of P V for q, k and v."""
    batch, _, rows, width = q.shape
    grad_out, q, k, v, out = (_aligned(x) for x in (grad_out, q, k, v, out))
    run = _flash_backward if kernel == "flash" else _efficient_backward
    if kernel == "efficient":
        bias, lse = align_bias(bias, batch), F.pad(lse, (0, -rows % 32), value=float("inf"))
    return [x[..., :width] for x in run(grad_out, q, k, v, bias, out, lse, scale)]


def align_bias(bias: Tensor | None, batch: int) -> Tensor | None:
    """Return a bias (1 or B, H, M, N) for the memory-efficient kernel, as (B, H, M, N)."""
    if bias is None:
        return None
    keys = bias.shape[-1]
    if bias.stride(-1) != 1 or any(stride % 16 for stride in bias.stride()[:-1]):
        padded = bias.new_zeros(*bias.shape[:-1], keys + -keys % 16)
        padded[..., :keys] = bias
        bias = padded[..., :keys]
    return bias.expand(batch, -1, -1, -1)


def _aligned(x: Tensor) -> Tensor:
    """Return `x` (B, H, N, D) with zeros up to a multiple of 8 channels, side by side in memory."""
    if x.shape[-1] % 8:
        return F.pad(x, (0, -x.shape[-1] % 8))
    return dense_channels(x)


def dense_channels(x: Tensor) -> Tensor:
    """Return `x` with channels side by side in memory: kernels that are called directly read it so, unchecked."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, _: object, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    none = torch.empty(0, dtype=torch.int64, device=q.device)
    rows, keys = q.shape[2], k.shape[2]
    return aten._scaled_dot_product_flash_attention_backward(
        grad_out, q, k, v, out, lse, None, None, rows, keys, 0.0, False, none, none, scale=scale
    )


def _efficient_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    none = torch.empty((), dtype=torch.int64, device=q.device)
    wanted = [True, True, True, False]
    gradients: tuple[Tensor, ...] = aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, k, v, bias, out, lse, none, none, 0.0, wanted, scale=scale
    )
    return gradients[:3]


# The gradient of the log-sum-exp, folded into what a fused backward kernel reads.
#
# The gradient of lse with respect to the logits is P. An upstream gradient g of lse therefore turns
#
#     dS = P * (dP - D)   into   dS = P * (dP - (D - g)),   D = rowsum(dO * O).
#
# Backward kernels read the saved output O for D alone, so another O' with rowsum(dO * O') = D - g in its place makes
# them compute this, at the head width of a plain backward pass and at its cost:
#
#     O' = O - g dO / |dO|².
#
# **Rows with little dO.** O' grows as |g| / |dO|, and has no value for dO = 0 (a dropped path, a token that nothing
# reads). With r, t as in `_LIMITS`, e = max(r |g| / W, t) and W the head width, rows with |dO| < W e get the constant
# row e in place of dO. The result is then the exact gradient for an upstream gradient that differs by at most 2 W e in
# norm: 2 r |g| if g is not extremely small. Rows with g = 0 stay as they are.
#
# **Error.** Let u be the unit roundoff of the type of O, and w that of g (float32, or float64). Every element of O' is
# rounded once, and |dO|² to W + 4 roundings, so
#
#     |rowsum(dO * O') - (D - g)| ≤ u (rowsum|dO * O| + |g|) + (W + 4) w |g|.
#
# The first term is what the rounding of O has already done to D, plus one rounding of g. So O' needs no other type than
# O's. In float16, |g| / |dO| ≤ 1 / r = 2¹⁴ keeps O' finite (the largest float16 is nearly 2¹⁶) for outputs below 2¹⁵.

_LIMITS = {
    torch.float64: (2.0**-200, 2.0**-400),
    torch.float32: (2.0**-60, 2.0**-60),
    torch.bfloat16: (2.0**-60, 2.0**-60),
    torch.float16: (2.0**-14, 2.0**-24),
}
"""By type: the least |dO| as a share of |g|, and the least element of a row in place of dO.

The squares of both stay normal numbers of the type of g; the second is a number of the type itself.
"""


def fold_lse_gradient(grad_out_BHMW: Tensor, grad_lse_BHM: Tensor, out_BHMW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upstream gradient and the output to hand to a backward kernel, which then adds P * g to dS."""
    dtype, width = grad_out_BHMW.dtype, grad_out_BHMW.shape[-1]
    ratio, least = _LIMITS[dtype]
    grad_BHM1 = grad_lse_BHM[..., None]
    norm_BHM1 = torch.linalg.vector_norm(grad_out_BHMW, dim=-1, keepdim=True, dtype=grad_BHM1.dtype)
    filler_BHM1 = (grad_BHM1.abs() * (ratio / width)).clamp_min(least).to(dtype)
    exact_BHM1 = filler_BHM1.to(grad_BHM1.dtype)  # |dO|² must be that of the rounded elements
    little_BHM1 = (norm_BHM1 < width * exact_BHM1) & (grad_BHM1 != 0)
    square_BHM1 = torch.where(little_BHM1, width * exact_BHM1.square(), norm_BHM1.square())
    factor_BHM1 = -grad_BHM1 / square_BHM1.clamp_min(torch.finfo(grad_BHM1.dtype).tiny)  # 0 for g = 0
    # Both keep the layout of their argument, which the kernels would copy otherwise.
    given_BHMW, folded_BHMW = torch.empty_like(grad_out_BHMW), torch.empty_like(out_BHMW)
    torch.where(little_BHM1, filler_BHM1, grad_out_BHMW, out=given_BHMW)
    torch.addcmul(out_BHMW, given_BHMW, factor_BHM1, out=folded_BHMW)  # rounds the sum once
    return given_BHMW, folded_BHMW


def precise(x: Tensor) -> Tensor:
    """Cast `x` to float32; keep float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def same_dtype(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Cast to the autocast dtype if autocast is on, as `scaled_dot_product_attention` does; else to one dtype.

    Expand the bias, (1 or B, 1 or H, M, N) or without the batch, over the heads, not over the batch.
    """
    device = q.device.type
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if torch.is_autocast_enabled(device) and dtype is not torch.float64:  # autocast keeps float64
        dtype = torch.get_autocast_dtype(device)
    if bias is not None:
        bias = bias.to(dtype)[(None,) * (4 - bias.dim())].expand(-1, q.shape[1], -1, -1)
    return q.to(dtype), k.to(dtype), v.to(dtype), bias


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return P V, laid out `by_token`, and the log-sum-exp (B, H, M) of the rows."""
    kernel = _kernel(q, bias)
    if kernel == "cpu":
        bias = None if bias is None else bias.expand(q.shape[0], -1, -1, -1)
        q, k, v = (dense_channels(x) for x in (q, k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    elif kernel == "other":
        out, lse = _forward_by_image(q, k, v, bias, scale)
    else:
        out, lse = cuda_forward(kernel, q, k, v, bias, scale)
    return by_token(out), lse.contiguous()


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of P V, and of the log-sum-exp if `grad_lse` (B, H, M) is given, for q, k and v."""
    kernel = _kernel(q, bias)
    if kernel == "other":
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
        return backward_with_bias(grad_out, grad_lse, q, k, v, bias, out, lse, scale)[:3]
    if grad_lse is not None:
        grad_out, out = fold_lse_gradient(grad_out, grad_lse, out)
    if kernel == "cpu":
        bias = None if bias is None else bias.expand(q.shape[0], -1, -1, -1)
        grad_out, q, k, v, out = (dense_channels(x) for x in (grad_out, q, k, v, out))
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale
        )
    else:
        dq, dk, dv = cuda_backward(kernel, grad_out, q, k, v, bias, out, lse, scale)
    return dq, dk, dv


def has_transposed(q: Tensor, bias: Tensor | None) -> bool:
    """Return whether `transposed_map` works here: on the CPU, without another bias than its key bias."""
    return _kernel(q, bias) == "cpu" and bias is None


def transposed_map(q_BHMD: Tensor, k_BHND: Tensor, g_BHMD: Tensor, lse_BHM: Tensor, scale: float) -> Tensor:
    """Return Pᵀ G (B, H, N, D) by one forward kernel; see the module `fused`.

    The bias keeps its precision: half precision could round a large log-sum-exp by hundreds. The last line multiplies
    by the row sums of Pᵀ, which are at most M.
    """
    bias_BHNM = (-lse_BHM)[:, :, None, :].expand(-1, -1, k_BHND.shape[2], -1)
    out, lse = forward(k_BHND, q_BHMD, g_BHMD.to(q_BHMD.dtype), bias_BHNM, scale)
    return (out * lse.exp()[..., None]).to(g_BHMD.dtype)


def backward_with_bias(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients for q, k, v and the bias, one image at a time: it needs memory for one bias, not B maps."""
    dq, dk, dv = (empty_by_token(x) for x in (q, k, v))
    grad_bias = (
        q.new_empty(0) if bias is None else torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    )
    per_image = bias is not None and bias.shape[0] > 1
    for image in range(q.shape[0]):
        logits = _logits(q, k, bias, scale, image)
        probabilities = (logits - lse[image][..., None]).exp().to(q.dtype)
        delta = (grad_out[image] * out[image]).sum(-1) - grad_lse[image]
        grad = probabilities * (grad_out[image] @ v[image].transpose(-2, -1) - delta[..., None].to(q.dtype))
        dq[image] = scale * grad @ k[image]
        dk[image] = scale * grad.transpose(-2, -1) @ q[image]
        dv[image] = probabilities.transpose(-2, -1) @ grad_out[image]
        if bias is not None:
            grad_bias[image if per_image else 0] += grad
    return dq, dk, dv, grad_bias


def by_token(x_BHND: Tensor) -> Tensor:
    """Return `x`, copied if it is not (B, N, H, D) in memory, as the kernels write what they return."""
    return x_BHND.transpose(1, 2).contiguous().transpose(1, 2)


def empty_by_token(x_BHND: Tensor) -> Tensor:
    """Return an empty tensor of the shape of `x` and the layout of `by_token`."""
    batch, heads, tokens, width = x_BHND.shape
    return x_BHND.new_empty(batch, tokens, heads, width).transpose(1, 2)


def empty_lse(q: Tensor) -> Tensor:
    """Return an empty tensor like the log-sum-exp of `forward`."""
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _kernel(q: Tensor, bias: Tensor | None) -> Literal["cpu", "flash", "efficient", "other"]:
    if q.device.type == "cuda":
        return choose(q, bias) or "other"
    return "cpu" if q.device.type == "cpu" else "other"


def _forward_by_image(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = empty_by_token(q), empty_lse(q)
    for image in range(q.shape[0]):
        logits = _logits(q, k, bias, scale, image)
        lse[image] = logits.logsumexp(-1)
        out[image] = logits.softmax(-1).to(v.dtype) @ v[image]
    return out, lse


def mean_map(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return the mean over the batch of softmax(s Q Kᵀ + bias), (H, M, N) in float32, computed image by image."""
    total = torch.zeros(
        q.shape[1], q.shape[2], k.shape[2], dtype=empty_lse(q[:1, :1, :1]).dtype, device=q.device
    )
    for image in range(q.shape[0]):
        total += _logits(q, k, bias, scale, image).softmax(-1)
    return total / q.shape[0]


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, image: int) -> Tensor:
    """Return s Q Kᵀ + bias of one image, (H, M, N), in float32 or better, as the fused kernels compute their lse.

    bfloat16 rounds a logit of 1,000 by up to 2, which is a factor of e² in its exponential.
    """
    with torch.autocast(q.device.type, enabled=False):
        logits = scale * precise(q[image]) @ precise(k[image]).transpose(-2, -1)
    return logits if bias is None else logits + bias[min(image, len(bias) - 1)]
