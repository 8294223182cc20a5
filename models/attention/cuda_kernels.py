"""torch's fused attention kernels of CUDA, given what they accept.

Both kernels need head widths that are multiples of 8, and the elements of a head side by side. Flash takes half
precision without a bias, from compute capability 8.0. The memory-efficient kernel needs rows of a bias that start at
multiples of 16 elements, and pads the log-sum-exp to a multiple of 32 rows with infinity.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

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


def forward(
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


def backward(
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
