"""The operators on a real GPU against dense float64."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.attention.base import Geometry, Heads
from graftvit.models.attention.fused import apply_map, attention_with_lse, map_logsumexp
from support.models.operator_cases import CASES, Case, draw
from torch import Tensor

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = "cuda"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
WIDTHS = [16, 20, 64, 80, 264]
"""Flash and memory-efficient kernels, widths that they are padded to, and one that neither takes."""


def close(value: Tensor, reference: Tensor, tolerance: float) -> bool:
    return bool((value.cpu().double() - reference).norm() <= tolerance * reference.norm().clamp_min(1e-12))


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = 0.3 * q @ k.transpose(-2, -1) + (0 if bias is None else bias)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


@pytest.mark.parametrize("operator", ["attention_with_lse", "apply_map", "map_logsumexp"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("images", [0, 1, 2], ids=["no bias", "shared bias", "bias by image"])
def test_fused(operator: str, dtype: torch.dtype, width: int, images: int) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 3, tokens, width).to(dtype) for tokens in (45, 37, 37)]
    given[0][1] = 0
    bias = torch.randn(images, 3, 45, 37).to(dtype) if images else None
    inputs = [x.to(DEVICE).requires_grad_() for x in given]
    exact = [x.double().requires_grad_() for x in given]
    moved, wide = (None, None) if bias is None else (bias.to(DEVICE), bias.double())
    upstream, upstream_lse = torch.randn(2, 3, 45, width).to(dtype), torch.randn(2, 3, 45)
    upstream[0, :, 1:] = 0  # rows that nothing reads
    out_exact, lse_exact = dense(*exact, wide)
    (q, k, v), (q64, k64, v64) = inputs, exact
    if operator == "attention_with_lse":
        found, wanted, taught = attention_with_lse(q, k, v, 0.3, moved), (out_exact, lse_exact), inputs
    elif operator == "apply_map":
        found, wanted, taught = (apply_map(q, k, v, 0.3, moved),), (out_exact,), [v]
    else:
        found, wanted, taught = (map_logsumexp(q, k, 0.3, moved),), (lse_exact,), [q, k]
    targets = {id(q): q64, id(k): k64, id(v): v64}
    gradients = [upstream if x.dim() == 4 else upstream_lse for x in found]
    grads = torch.autograd.grad(found, taught, [g.to(x) for g, x in zip(gradients, found, strict=True)])
    grads_exact = torch.autograd.grad(
        wanted, [targets[id(x)] for x in taught], [g.double() for g in gradients]
    )
    tolerance = TOLERANCE[dtype]
    assert all(close(x, y, tolerance) for x, y in zip(found, wanted, strict=True))
    assert all(close(x, y, 2 * tolerance) for x, y in zip(grads, grads_exact, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(case: Case) -> None:
    geometry = Geometry(1, (7, 9))
    exact, heads = case.build(geometry, torch.float64), draw(geometry, torch.float64)
    operator = case.build(geometry, torch.float32).to(DEVICE)
    moved = Heads(*(x.to(DEVICE, torch.float32) for x in heads.qkv()), None, heads.scale, geometry=geometry)
    assert close(operator(moved), exact(heads), 1e-3 * case.tolerance)
