"""One attention operator on random projections, timed in turn with fused softmax attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ....models.attention.base import AttentionOperator, Geometry, Heads, LayerShape
from ....models.errors import ConfigError
from ....models.layer_plan import Choice, create_operator, parse_plan
from .cases import DTYPES, SOFTMAX, Case, Row, Ways
from .measuring import compiled, measure_case
from .public_forms import public_form
from .straight_forms import straight_form
from .timing import Step, counted_macs, step_of

LONGEST = 2
"""How many times as long as wide a grid may be."""


@dataclass(frozen=True)
class Layer:
    """The layer around the operator."""

    heads: int = 6
    head_dim: int = 64
    prefix: int = 0

    def shape(self, tokens: int) -> LayerShape:
        """Return the layer over so many patches."""
        return LayerShape(self.heads, self.head_dim, Geometry(self.prefix, grid_of(tokens)))

    def __str__(self) -> str:
        prefix = f", {self.prefix} prefix tokens" if self.prefix else ""
        return f"{self.heads} heads of {self.head_dim}{prefix}"


def grid_of(tokens: int) -> tuple[int, int]:
    """Return the squarest grid of `tokens` patches. Raises ConfigError: no grid has a common shape."""
    height = next((side for side in range(math.isqrt(max(tokens, 0)), 0, -1) if tokens % side == 0), 0)
    if height == 0 or tokens > LONGEST * height**2:
        side = max(1, round(max(tokens, 1) ** 0.5))
        raise ConfigError(
            f"--tokens {tokens}: there is no grid of so many patches; take {side**2} ({side} x {side}), and "
            "--prefix for a class token"
        )
    return height, tokens // height


def choice_of(text: str) -> Choice:
    """Parse an operator with options, as `kernel(feature=relu)`. Raises ConfigError: it is not valid."""
    return parse_plan({"*": text}, 1)[0]


def operator_cases(names: Sequence[str], tokens: Sequence[int], layer: Layer, ways: Ways) -> list[Case]:
    """Return every combination, short ones first.

    Raises ConfigError: an operator, an option or a grid is not there.
    """
    for name in names:
        for size in tokens:
            operator = create_operator(choice_of(name), layer.shape(size))
            if ways.peers:
                _check_peers(name, operator, layer)
    return ways.cases("operators", [str(choice_of(name)) for name in names], [str(layer)], tokens)


def measure_operator(case: Case, layer: Layer, repeats: int) -> Row:
    """Measure times, memory and multiply-adds of one case."""
    torch.manual_seed(0)
    device, dtype, shape = torch.device(case.device), DTYPES[case.dtype], layer.shape(case.size)
    softmax, operator = (
        create_operator(choice_of(name), shape).to(device, dtype).eval() for name in (SOFTMAX, case.name)
    )
    operator.fit([], seed=0)
    heads = _draw(shape, case.batch, device, dtype)
    steps = [
        _step(each, heads, case.backward, each.parameters()) for each in (softmax, compiled(operator, case))
    ]
    counted = counted_macs(_step(operator, _draw(shape, 1, device, dtype), backward=False))
    macs = operator.macs(shape.geometry)
    if not case.peers:
        return measure_case(case, steps, repeats, macs=macs, counted=counted)
    peers, package = _peers(case.name, operator, heads, case.backward)
    return measure_case(case, steps, repeats, macs=macs, counted=counted, peers=peers, package=package)


def _check_peers(name: str, operator: AttentionOperator, layer: Layer) -> None:
    if layer.prefix:
        raise ConfigError(
            f"--prefix {layer.prefix} with --peers: public implementations have no prefix tokens; take --prefix 0"
        )
    public_form(name, operator, _draw(operator.shape, 1, torch.device("cpu"), torch.float32))


def _peers(
    name: str, operator: AttentionOperator, heads: Heads, backward: bool
) -> tuple[dict[str, Step], str]:
    """Return the steps of the straight-line form and of the public implementation, and the name of its package."""
    straight, public = straight_form(operator), public_form(name, operator, heads)
    steps = {} if straight is None else {"straight": _step(straight, heads, backward, operator.parameters())}
    if public is None:
        return steps, ""
    package, call, parameters = public
    return {
        **steps,
        "public": _step(lambda heads: call(*heads.qkv()), heads, backward, parameters),
    }, package


def _draw(shape: LayerShape, batch: int, device: torch.device, dtype: torch.dtype) -> Heads:
    """Draw random projections, laid out in memory as a layer gives them: (B, N, H, D), seen as (B, H, N, D)."""
    size = (3, batch, shape.geometry.num_tokens, shape.num_heads, shape.head_dim)
    q, k, v = torch.randn(size, device=device, dtype=dtype).transpose(2, 3).unbind(0)
    return Heads(q, k, v, None, shape.head_dim**-0.5, geometry=shape.geometry)


def _step(
    run: Callable[[Heads], Tensor], heads: Heads, backward: bool, parameters: Iterable[Tensor] = ()
) -> Step:
    """Return a step whose output is laid out as the next projection of a layer reads it, (B, N, H D)."""

    def by_token(heads: Heads) -> Tensor:
        return run(heads).transpose(1, 2).flatten(2)

    if not backward:
        return step_of(partial(by_token, heads))
    q, k, v = (x.detach().requires_grad_() for x in heads.qkv())
    ready = heads.with_qkv(q, k, v)
    upstream = torch.randn_like(v.transpose(1, 2).flatten(2))
    return step_of(partial(by_token, ready), [q, k, v, *parameters], upstream)
