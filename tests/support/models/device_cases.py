"""A step on fake tensors of a GPU: where it would wait for the GPU, or mix its tensors with the CPU's, it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By name: the type of autocast."""
MAKERS = ("tensor", "as_tensor", "asarray", "from_numpy")


class NoTransfer(TorchDispatchMode):
    """Refuse what reads tensors of the CPU to make one of a GPU: the copy waits for all that the GPU has to do."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        result = operator(*arguments, **(options or {}))
        given = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if any(x.device.type == "cuda" for x in made):
            assert not any(x.device.type == "cpu" and x.dim() for x in given), f"{operator} copies to the GPU"
        return result


def to_fake_gpu(module: nn.Module) -> nn.Module:
    """Replace the parameters and buffers of a module by fake ones on a GPU, within `FakeTensorMode`."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                part._parameters[name] = nn.Parameter(empty, requires_grad=weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return module


def _refuse(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*arguments: Any, **options: Any) -> Tensor:
        result = make(*arguments, **options)
        assert result.device.type != "cuda", "numbers of Python are copied to the GPU"
        return result

    return made


@contextmanager
def one_step(precision: str) -> Iterator[None]:
    """A forward pass within `FakeTensorMode`.

    torch's engine of backward passes needs a real GPU; `test_fake_kernels` has those of our operators.
    """
    dtype = PRECISIONS[precision]
    with ExitStack() as stack:
        stack.enter_context(NoTransfer())
        for name in MAKERS:
            stack.enter_context(patch.object(torch, name, _refuse(getattr(torch, name))))
        if dtype is not None:
            stack.enter_context(_autocast(dtype))
        yield


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    """`torch.autocast`, which turns itself off without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()
