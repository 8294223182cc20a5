"""The operators on fake tensors of a GPU: what tracing promises is what the kernels of CUDA return."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from graftvit.models.attention import fused, kernels
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

TENSORS = [(torch.float32, "heads"), (torch.bfloat16, "timm")]
TENSORS += [
    pytest.param(*each, marks=pytest.mark.slow)
    for each in ((torch.float16, "heads"), (torch.float64, "timm"))
]
SHAPES = [(2, 3, 17, 17, 16), (1, 2, 33, 5, 64), (2, 2, 9, 9, 20), (2, 1, 1, 1, 8), (1, 2, 10, 10, 264)]


def draw(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> list[Tensor]:
    batch, heads, rows, keys, width = shape

    def one(tokens: int) -> Tensor:
        if layout == "timm":
            qkv = torch.empty(batch, tokens, 3, heads, width, device="cuda", dtype=dtype)
            return qkv.permute(2, 0, 3, 1, 4)[0]
        return torch.empty(batch, heads, tokens, width, device="cuda", dtype=dtype)

    return [one(rows), one(keys), one(keys)]


def signatures(outputs: Tensor | Sequence[Tensor]) -> list[tuple[object, ...]]:
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return [(x.shape, x.stride(), x.dtype, x.device) for x in outputs]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "layout"), TENSORS)
@pytest.mark.parametrize("images", [0, 1, -1], ids=["no bias", "shared bias", "bias by image"])
def test_shapes_types_and_layouts(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, images: int
) -> None:
    with FakeTensorMode():
        q, k, v = draw(shape, dtype, layout)
        batch, heads, rows, keys, _ = shape
        size = (batch if images < 0 else 1, heads, rows, keys)
        bias = torch.empty(size, device="cuda", dtype=dtype) if images else None
        out, lse = fused._attention_with_lse(q, k, v, bias, 0.3)
        grad_out, grad_lse, saved = (
            torch.empty_like(out),
            torch.empty_like(lse),
            (q, k, v, bias, out, lse, 0.3),
        )
        calls = [
            (fused._attention_with_lse, (q, k, v, bias, 0.3)),
            (fused._apply_map, (q, k, v, bias, 0.3)),
            (fused._map_logsumexp, (q, k, bias, 0.3)),
            (fused._attention_with_lse_backward, (grad_out, grad_lse, *saved, False)),
            (fused._attention_with_lse_backward, (grad_out, grad_lse, *saved, True)),
            (fused._apply_map_backward, (grad_out, *saved)),
            (fused._map_logsumexp_backward, (grad_lse, q, k, bias, lse, out, 0.3)),
        ]
        for operator, arguments in calls:
            if operator is fused._attention_with_lse_backward and arguments[-1] and bias is None:
                continue
            assert signatures(operator._init_fn(*arguments)) == signatures(operator(*arguments))


def test_which_kernel_a_gpu_uses() -> None:
    with FakeTensorMode():
        q = torch.empty(1, 2, 7, 20, device="cuda", dtype=torch.bfloat16)
        assert kernels._kernel(q, None) == "flash"
        assert kernels._kernel(q, q) == "efficient"
        assert kernels._kernel(q.float(), None) == "efficient"
        assert kernels._kernel(q.double(), None) == "other"
