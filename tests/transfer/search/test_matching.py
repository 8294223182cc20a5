"""The mismatch of a program with a teacher's layers, against the definition."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.conversion import convert
from graftvit.models.errors import TransferError
from graftvit.models.families import sites
from graftvit.models.host import AttentionHost
from graftvit.models.programs.program import LINEAR, parse_program
from graftvit.transfer.search.matching import RecordedLayer, mismatch, record_layers
from support.models.dense import TINY, tiny
from support.models.pyramids import TINY as PYRAMIDS
from support.models.pyramids import images
from support.models.pyramids import tiny as pyramid

SOFTMAX = "mm(softmax(nt(scale(q) k)) v)"


def layer(seed: int = 0, heads: int = 2) -> RecordedLayer:
    x = torch.randn(4, 6, heads, 9, 5, generator=torch.Generator().manual_seed(seed))
    q, k, v, _ = x.unbind(0)
    return RecordedLayer(q, k, v, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_it_is_the_error_of_least_squares_on_the_other_half() -> None:
    recorded, program = layer(), parse_program(LINEAR)
    out = program(q=recorded.q, k=recorded.k, v=recorded.v).double()
    errors = []
    for head in range(2):
        rows = torch.cat((out[:, head].flatten(0, 1), torch.ones(54, 1)), 1)
        wanted = recorded.out[:, head].flatten(0, 1).double()
        weights = torch.linalg.lstsq(rows[:27], wanted[:27]).solution
        targets = wanted[27:]
        errors.append((rows[27:] @ weights - targets).norm() / (targets - targets.mean(0)).norm())
    assert mismatch(program, [recorded]) == pytest.approx(float(sum(errors) / 2), rel=5e-3)


def test_the_teachers_own_formula_has_none_whatever_its_scale() -> None:
    for text in (SOFTMAX, f"neg({SOFTMAX})", "mm(softmax(nt(scale(q) k)) neg(v))"):
        assert mismatch(parse_program(text), [layer(), layer(1)]) < 1e-4
    assert mismatch(parse_program("mul(q v)"), [layer()]) > 0.5


def test_what_is_not_finite_matches_nothing() -> None:
    assert mismatch(parse_program("mul(v sumnorm(sub(q q)))"), [layer()]) == float("inf")


@pytest.mark.parametrize("family", ["vit", "dinov2_registers"])
def test_layers_are_those_of_the_teacher(family: str) -> None:
    teacher = tiny(family, dtype=torch.float32, **TINY)
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
    assert [each.q.shape[2] for each in recorded] == [
        site.shape.geometry.num_patches for site in sites(teacher)
    ]
    assert [type(module) for module in teacher.modules()] == modules
    assert mismatch(parse_program(LINEAR), recorded) > 0
    assert PYRAMIDS[kind]


def test_a_teacher_that_lost_its_softmax_is_refused() -> None:
    teacher = convert(tiny("vit", dtype=torch.float32, **TINY), "1: attnzero_105")
    with pytest.raises(
        TransferError, match="layer 1 of the teacher has attnzero_105 in place of softmax attention"
    ):
        record_layers(teacher, torch.randn(4, 3, 32, 48))


def test_one_image_is_refused() -> None:
    with pytest.raises(TransferError, match="1 image: give 2 or more"):
        record_layers(tiny("vit", dtype=torch.float32, **TINY), torch.randn(1, 3, 32, 48))
