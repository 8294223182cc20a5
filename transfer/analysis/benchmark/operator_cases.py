"""One attention operator on random projections, timed in turn with fused softmax attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ....models.attention.base import AttentionOperator, Geometry, Heads, LayerShape
from ....models.errors import ConfigError
from ....models.operators import create_operator
from ....models.plan import Choice, parse_plan
from .cases import DTYPES, SOFTMAX, Case, Row, load_average
from .timing import Step, counted_macs, peak_bytes, time_steps

LONGEST = 2
"""How many times as long as wide a grid may be."""


@dataclass(frozen=True)
class Layer:
    """The layer around the operator."""

    heads: int = 6
    head_dim: int = 64
    prefix: int = 0

    def __str__(self) -> str:
        prefix = f", {self.prefix} prefix tokens" if self.prefix else ""
        return f"{self.heads} heads of {self.head_dim}{prefix}"


def grid_of(tokens: int) -> tuple[int, int]:
    """The squarest grid of so many patches. Raises ConfigError: there is none of a common shape."""
    height = next((side for side in range(math.isqrt(max(tokens, 0)), 0, -1) if tokens % side == 0), 0)
    if height == 0 or tokens > LONGEST * height**2:
        side = max(1, round(max(tokens, 1) ** 0.5))
        raise ConfigError(
            f"--tokens {tokens}: there is no grid of so many patches; take {side**2} ({side} x {side}), and "
            "--prefix for a class token"
        )
    return height, tokens // height


def choice_of(text: str) -> Choice:
    """An operator with options, as `kernel(feature=relu)`. Raises ConfigError where it is none."""
    return parse_plan({"*": text}, 1)[0]


def operator_cases(
    names: Sequence[str],
    tokens: Sequence[int],
    batches: Sequence[int],
    dtypes: Sequence[str],
    device: str,
    layer: Layer,
    *,
    backward: bool,
    compiled: bool,
) -> list[Case]:
    """Every combination, short ones first; forward always, backward and compiled besides where asked for.

    Raises ConfigError: an operator, an option or a grid is not there.
    """
    for name in names:
        for size in tokens:
            _shape = LayerShape(layer.heads, layer.head_dim, Geometry(layer.prefix, grid_of(size)))
            create_operator(choice_of(name), _shape)
    return [
        Case("operators", str(choice_of(name)), str(layer), size, batch, dtype, device, back, fast)
        for size in sorted(tokens)
        for batch in batches
        for dtype in dtypes
        for back in ([False, True] if backward else [False])
        for fast in ([False, True] if compiled else [False])
        for name in names
    ]


def measure_operator(case: Case, layer: Layer, repeats: int) -> Row:
    """Times, memory and multiply-adds of one case."""
    geometry = Geometry(layer.prefix, grid_of(case.size))
    torch.manual_seed(0)
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    operators = {
        name: _build(name, LayerShape(layer.heads, layer.head_dim, geometry), device, dtype)
        for name in (SOFTMAX, case.name)
    }
    heads = _draw(geometry, layer, case, device, dtype)
    softmax = _step(operators[SOFTMAX], heads, case.backward)
    operator = operators[case.name]
    ran = cast(nn.Module, torch.compile(operator)) if case.compiled else operator
    own = _step(ran, heads, case.backward)
    timings = time_steps({"softmax": softmax, "own": own}, repeats, device)
    one = _draw(geometry, layer, case, device, dtype, batch=1)
    return Row(
        case,
        timings["own"].median,
        timings["own"].low,
        timings["own"].high,
        timings["softmax"].median,
        peak_bytes(own, device),
        operator.macs(geometry),
        counted_macs(_step(operator, one, backward=False)),
        load_average(),
    )


def _build(name: str, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> AttentionOperator:
    return create_operator(choice_of(name), shape).to(device, dtype).eval()


def _draw(
    geometry: Geometry,
    layer: Layer,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    batch: int | None = None,
) -> Heads:
    """Random projections, laid out in memory as a layer gives them: (B, N, H, D), seen as (B, H, N, D)."""
    shape = (3, batch or case.batch, geometry.num_tokens, layer.heads, layer.head_dim)
    q, k, v = torch.randn(shape, device=device, dtype=dtype).transpose(2, 3).unbind(0)
    return Heads(q, k, v, None, layer.head_dim**-0.5, geometry=geometry)


def _step(operator: nn.Module, heads: Heads, backward: bool) -> Step:
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                operator(heads)

        return forward
    q, k, v = (x.detach().requires_grad_() for x in heads.qkv())
    leaves: list[Tensor] = [q, k, v, *operator.parameters()]
    ready, upstream = heads.with_qkv(q, k, v), torch.randn_like(v)

    def learn() -> None:
        torch.autograd.grad(operator(ready), leaves, upstream, allow_unused=True)

    return learn
