"""The fit of a program's inputs by gradients."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.programs.program import parse_program
from graftvit.transfer.search.matching import (
    RecordedLayer,
    fit_maps,
    fitted_mismatch,
    matching_error,
    mismatch,
)

SOFTMAX = "mm(softmax(nt(scale(q) k)) v)"


def layer(change: float) -> RecordedLayer:
    """Return a layer whose teacher scales its queries by 1 + `change`, and shifts them."""
    x = torch.randn(3, 8, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    q, k, v = x.unbind(0)
    attended = torch.nn.functional.scaled_dot_product_attention(q * (1 + change) + change, k, v)
    return RecordedLayer(q, k, v, attended)


def test_the_error_of_the_fit_is_that_of_least_squares() -> None:
    recorded, program = layer(0.5), parse_program("mul(q v)")
    out = program(q=recorded.q, v=recorded.v)
    errors = []
    for head in range(2):
        rows = torch.cat((out[:, head].flatten(0, 1), torch.ones(72, 1)), 1).double()
        wanted = recorded.out[:, head].flatten(0, 1).double()
        left = rows @ torch.linalg.lstsq(rows, wanted).solution - wanted
        errors.append(left.norm() / (wanted - wanted.mean(0)).norm())
    assert float(matching_error(out, recorded.out)) == pytest.approx(float(sum(errors) / 2), rel=1e-4)


def test_maps_bring_a_program_nearer_to_a_teacher_with_other_queries() -> None:
    program, recorded = parse_program(SOFTMAX), layer(0.6)
    before = mismatch(program, [recorded])
    assert before > 0.05
    assert fitted_mismatch(program, [recorded]) < 0.9 * before


def test_a_program_that_fits_keeps_its_inputs() -> None:
    program, recorded = parse_program(SOFTMAX), layer(0.0)
    inputs = {"q": recorded.q, "k": recorded.k, "v": recorded.v}
    identity = torch.eye(5, 4)
    for one in fit_maps(program, inputs, recorded.out).values():
        assert (one - identity).abs().max() < 1e-2
    assert fitted_mismatch(program, [recorded]) < 1e-2


def test_unused_inputs_have_no_maps_and_what_is_not_finite_matches_nothing() -> None:
    recorded = layer(0.2)
    assert set(fit_maps(parse_program("q"), {"q": recorded.q}, recorded.out)) == {"q"}
    assert fitted_mismatch(parse_program("mul(v sumnorm(sub(q q)))"), [recorded]) == float("inf")
