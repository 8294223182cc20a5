"""GPUs that are not there: kernels of CUDA that compute on a CPU and refuse what the real ones refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def _dense(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = scale * q.float() @ k.float().transpose(-2, -1)
    return logits if bias is None else logits + bias.float()


def _check(*tensors: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    widths = {x.shape[-1] for x in tensors}
    assert len(widths) == 1, "the kernels take one head width"
    assert widths.pop() % 8 == 0, "the kernels take head widths that are multiples of 8"
    for x in tensors:
        assert x.stride(-1) == 1, "the elements of a head must be side by side"
        assert x.dtype in dtypes
        assert x.dtype == tensors[0].dtype


def _check_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> None:
    if bias is not None:
        assert bias.shape == (*q.shape[:3], k.shape[2])
        assert bias.dtype == q.dtype
        assert bias.stride(-1) == 1
        assert all(stride % 16 == 0 for stride in bias.stride()[:-1]), "rows of the bias must be aligned"


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Return the gradients as the kernels compute them: D from the saved output, P from the log-sum-exp."""
    map_BHMN = (_dense(q, k, bias, scale) - lse[..., None]).exp()
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    logits = map_BHMN * (grad.float() @ v.float().transpose(-2, -1) - delta)
    gradients = (
        scale * logits @ k.float(),
        scale * logits.transpose(-2, -1) @ q.float(),
        map_BHMN.transpose(-2, -1) @ grad.float(),
    )
    return tuple(x.to(q.dtype) for x in gradients)


class SimulatedKernels:
    """In place of `torch.ops.aten` in `kernels`, for tensors on the CPU."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _scaled_dot_product_flash_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float
    ) -> tuple[Tensor, ...]:
        self.calls.append("flash")
        _check(q, k, v, dtypes=HALF)
        logits = _dense(q, k, None, scale)
        return (logits.softmax(-1) @ v.float()).to(q.dtype), logits.logsumexp(-1), torch.empty(0)

    def _scaled_dot_product_efficient_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keeps_lse: bool, *, scale: float
    ) -> tuple[Tensor, ...]:
        self.calls.append("efficient")
        assert keeps_lse
        _check(q, k, v, dtypes=(*HALF, torch.float32))
        _check_bias(bias, q, k)
        logits = _dense(q, k, bias, scale)
        lse = F.pad(logits.logsumexp(-1), (0, -q.shape[2] % 32), value=float("inf"))
        return (logits.softmax(-1) @ v.float()).to(q.dtype), lse, torch.empty(0)

    def _scaled_dot_product_flash_attention_backward(self, *given: Any, scale: float) -> tuple[Tensor, ...]:
        grad, q, k, v, out, lse, *rest = given
        self.calls.append("flash backward")
        _check(grad, q, k, v, out, dtypes=HALF)
        assert tuple(rest[2:6]) == (q.shape[2], k.shape[2], 0.0, False)
        assert lse.shape == q.shape[:3]
        assert lse.is_contiguous()
        return _backward(grad, q, k, v, None, out, lse, scale)

    def _scaled_dot_product_efficient_attention_backward(
        self, *given: Any, scale: float
    ) -> tuple[Tensor, ...]:
        grad, q, k, v, bias, out, lse, *rest = given
        self.calls.append("efficient backward")
        _check(grad, q, k, v, out, dtypes=(*HALF, torch.float32))
        _check_bias(bias, q, k)
        assert lse.shape[2] % 32 == 0, "the log-sum-exp must be padded to 32 rows"
        assert bool((lse[..., q.shape[2] :] == float("inf")).all())
        assert rest[2:] == [0.0, [True, True, True, False]]
        return *_backward(grad, q, k, v, bias, out, lse[..., : q.shape[2]], scale), torch.empty(0)


def chooser(kernel: str) -> Callable[[Tensor, Tensor | None], str]:
    """Return a `kernels._kernel` that takes tensors on the CPU for tensors on a GPU."""
    return lambda q, bias: "efficient" if bias is not None and kernel == "flash" else kernel
