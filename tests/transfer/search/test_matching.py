"""The mismatch of a program with a teacher's layers, its fit by gradients, and scores without one."""

from __future__ import annotations

import math

import pytest
import torch
from graftvit.models.conversion import convert
from graftvit.models.errors import TransferError
from graftvit.models.families import sites
from graftvit.models.host import AttentionHost
from graftvit.models.programs.program import LINEAR, parse_program
from graftvit.transfer.search.matching import (
    SCORES,
    RecordedLayer,
    fit_maps,
    fitted_mismatch,
    matching_error,
    mismatch,
    rank,
    record_layers,
    sensitivity,
    unfitted,
)
from graftvit.transfer.search.program_search import SOFTMAX
from support.models.dense import tiny
from support.models.pyramids import images
from support.models.pyramids import tiny as pyramid


def layer(seed: int = 0, change: float = 0.0, scale: float = 1.0) -> RecordedLayer:
    """Return a layer whose teacher scales its queries by 1 + `change`, and shifts them, and its output by `scale`."""
    x = torch.randn(3, 8, 2, 9, 4, generator=torch.Generator().manual_seed(seed))
    q, k, v = x.unbind(0)
    attended = torch.nn.functional.scaled_dot_product_attention(q * (1 + change) + change, k, v)
    return RecordedLayer(q, k, v, scale * attended)


def test_it_is_the_error_of_least_squares_on_the_other_half() -> None:
    recorded, program = layer(), parse_program(LINEAR)
    out = program(q=recorded.q, k=recorded.k, v=recorded.v).double()
    errors = []
    for head in range(2):
        rows = torch.cat((out[:, head].flatten(0, 1), torch.ones(72, 1)), 1)
        wanted = recorded.out[:, head].flatten(0, 1).double()
        weights = torch.linalg.lstsq(rows[:36], wanted[:36]).solution
        targets = wanted[36:]
        errors.append((rows[36:] @ weights - targets).norm() / (targets - targets.mean(0)).norm())
    assert mismatch(program, [recorded]) == pytest.approx(float(sum(errors) / 2), rel=5e-3)


def test_the_teachers_own_formula_has_none_whatever_its_scale() -> None:
    for text in (SOFTMAX, f"neg({SOFTMAX})", "mm(softmax(nt(scale(q) k)) neg(v))"):
        assert mismatch(parse_program(text), [layer(), layer(seed=1)]) < 1e-4
    assert mismatch(parse_program("mul(q v)"), [layer()]) > 0.5


@pytest.mark.parametrize("family", ["vit", "dinov2_registers"])
def test_layers_are_those_of_the_teacher(family: str) -> None:
    teacher = tiny(family, dtype=torch.float32)
    seen = torch.randn(4, 3, 32, 48)
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    recorded = record_layers(teacher, seen)
    assert len(recorded) == len(sites(teacher)) == 3
    shape = sites(teacher)[0].shape
    assert recorded[0].q.shape == (4, shape.num_heads, shape.geometry.num_patches, shape.head_dim)
    assert not any(isinstance(module, AttentionHost) for module in teacher.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("kind", ["pvt", "swin"])
def test_a_pyramid_is_recorded_stage_by_stage(kind: str) -> None:
    teacher = pyramid(kind)
    modules = [type(module) for module in teacher.modules()]
    recorded = record_layers(teacher, torch.cat([images((32, 32))] * 2))
    patches = [site.shape.geometry.num_patches for site in sites(teacher)]
    assert [each.q.shape[2] for each in recorded] == patches
    assert [type(module) for module in teacher.modules()] == modules
    assert mismatch(parse_program(LINEAR), recorded) > 0


def test_a_teacher_that_lost_its_softmax_and_one_image_are_refused() -> None:
    teacher = tiny("vit", dtype=torch.float32)
    with pytest.raises(TransferError, match="1 image: give 2 or more"):
        record_layers(teacher, torch.randn(1, 3, 32, 48))
    with pytest.raises(TransferError, match="layer 1 of the teacher has attnzero_105 in place of softmax"):
        record_layers(convert(teacher, "1: attnzero_105"), torch.randn(4, 3, 32, 48))


def test_the_error_of_the_fit_is_that_of_least_squares() -> None:
    recorded, program = layer(change=0.5), parse_program("mul(q v)")
    out = program(q=recorded.q, v=recorded.v)
    errors = []
    for head in range(2):
        rows = torch.cat((out[:, head].flatten(0, 1), torch.ones(72, 1)), 1).double()
        wanted = recorded.out[:, head].flatten(0, 1).double()
        left = rows @ torch.linalg.lstsq(rows, wanted).solution - wanted
        errors.append(left.norm() / (wanted - wanted.mean(0)).norm())
    assert float(matching_error(out, recorded.out)) == pytest.approx(float(sum(errors) / 2), rel=1e-4)


def test_maps_bring_a_program_nearer_to_a_teacher_with_other_queries() -> None:
    program, recorded = parse_program(SOFTMAX), layer(change=0.6)
    before = mismatch(program, [recorded])
    assert before > 0.05
    assert fitted_mismatch(program, [recorded]) < 0.9 * before


def test_a_program_that_fits_keeps_its_inputs() -> None:
    program, recorded = parse_program(SOFTMAX), layer(change=0.0)
    inputs = {"q": recorded.q, "k": recorded.k, "v": recorded.v}
    identity = torch.eye(5, 4)
    for one in fit_maps(program, inputs, recorded.out).values():
        assert (one - identity).abs().max() < 1e-2
    assert fitted_mismatch(program, [recorded]) < 1e-2


def test_the_error_without_a_fit_sees_the_scale() -> None:
    program = parse_program(SOFTMAX)
    assert unfitted(program, [layer()]) == pytest.approx(0.0, abs=1e-5)
    out, wanted = (
        layer().out.transpose(0, 1).flatten(1, 2),
        layer(scale=2.0).out.transpose(0, 1).flatten(1, 2),
    )
    errors = [(a - b).norm() / (b - b.mean(0)).norm() for a, b in zip(out, wanted, strict=True)]
    assert unfitted(program, [layer(scale=2.0)]) == pytest.approx(-float(sum(errors) / 2), rel=1e-5)


def test_the_rank_is_that_of_the_covariance() -> None:
    recorded = layer()
    flat = torch.stack([torch.arange(72.0).view(8, 9)] * 2, 1)
    line = flat[..., None] * torch.tensor([1.0, 2.0, 0.0, 0.0])
    even = torch.eye(4).repeat(18, 1).view(8, 1, 9, 4).expand(8, 2, 9, 4)
    values = parse_program("v")
    assert rank(values, [RecordedLayer(recorded.q, recorded.k, line, line)]) == pytest.approx(1.0, abs=1e-6)
    assert rank(values, [RecordedLayer(recorded.q, recorded.k, even, even)]) == pytest.approx(3.0, abs=1e-6)


def test_the_sensitivity_is_that_of_differences() -> None:
    """In float64, E is differentiated by each entry of V with central differences."""
    recorded, program, step = layer(scale=2.0), parse_program("neg(v)"), 1e-4
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


def test_outputs_that_are_not_finite_match_nothing_and_have_the_worst_scores() -> None:
    program = parse_program("mul(v sumnorm(sub(q q)))")
    assert mismatch(program, [layer()]) == fitted_mismatch(program, [layer()]) == math.inf
    worst = {"unfitted": -math.inf, "rank": 0.0, "sensitivity": -math.inf}
    assert {name: score(program, [layer()]) for name, score in SCORES.items()} == worst
    assert set(fit_maps(parse_program("q"), {"q": layer().q}, layer().out)) == {"q"}, (
        "no maps of unused inputs"
    )
