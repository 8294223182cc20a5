"""Scores that need neither a fit nor a training, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from graftvit.models.programs.program import parse_program
from graftvit.transfer.search.matching import SCORES, RecordedLayer, rank, sensitivity, unfitted
from graftvit.transfer.search.program_search import SOFTMAX


def layer(scale: float = 1.0) -> RecordedLayer:
    x = torch.randn(3, 4, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    q, k, v = x.unbind(0)
    return RecordedLayer(q, k, v, scale * torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_the_error_without_a_fit_sees_the_scale() -> None:
    program = parse_program(SOFTMAX)
    assert unfitted(program, [layer()]) == pytest.approx(0.0, abs=1e-5)
    out, wanted = layer().out.transpose(0, 1).flatten(1, 2), layer(2.0).out.transpose(0, 1).flatten(1, 2)
    errors = [(a - b).norm() / (b - b.mean(0)).norm() for a, b in zip(out, wanted, strict=True)]
    assert unfitted(program, [layer(2.0)]) == pytest.approx(-float(sum(errors) / 2), rel=1e-5)


def test_the_rank_is_that_of_the_covariance() -> None:
    recorded = layer()
    flat = torch.stack([torch.arange(36.0).view(4, 9)] * 2, 1)
    line = flat[..., None] * torch.tensor([1.0, 2.0, 0.0, 0.0])
    even = torch.eye(4).repeat(9, 1).view(4, 1, 9, 4).expand(4, 2, 9, 4)
    values = parse_program("v")
    assert rank(values, [RecordedLayer(recorded.q, recorded.k, line, line)]) == pytest.approx(1.0, abs=1e-6)
    assert rank(values, [RecordedLayer(recorded.q, recorded.k, even, even)]) == pytest.approx(3.0, abs=1e-6)


def test_the_sensitivity_is_that_of_differences() -> None:
    """In float64, E is differentiated by each entry of V with central differences."""
    recorded, program, step = layer(2.0), parse_program("neg(v)"), 1e-4
    v = recorded.v.double()
    total = 0.0
    for place in range(v.numel()):
        moved = [v.clone(), v.clone()]
        for sign, x in zip((1, -1), moved, strict=True):
            x.view(-1)[place] += sign * step
        up, down = (error(-x, recorded.out.double()) for x in moved)
        total += abs(float(v.view(-1)[place]) * (up - down) / (2 * step))
    assert sensitivity(program, [recorded]) == pytest.approx(math.log(total), rel=1e-3)


def error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    heads = zip(out.transpose(0, 1).flatten(1, 2), wanted.transpose(0, 1).flatten(1, 2), strict=True)
    return float(sum((a - b).norm() / (b - b.mean(0)).norm() for a, b in heads) / 2)


def test_outputs_that_are_not_finite_have_the_worst_scores() -> None:
    program = parse_program("mul(v sumnorm(sub(q q)))")
    worst = {"unfitted": -math.inf, "rank": 0.0, "sensitivity": -math.inf}
    assert {name: score(program, [layer()]) for name, score in SCORES.items()} == worst
