"""Calibration on the teacher's own inputs: what each layer is given, and that no layer gets worse."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from graftvit.models import layer_plan as operators
from graftvit.models.attention.base import Heads, LayerShape
from graftvit.models.attention.softmax import SoftmaxAttention
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.errors import UnsupportedModelError
from support.models import dense
from support.models.operator_cases import CASES
from torch import Tensor, nn

IMAGES = dense.images(4, dtype=torch.float32)


class Gain(SoftmaxAttention):
    """Softmax attention times a number, which calibration fits; `worse` fits it badly."""

    seen: ClassVar[list[tuple[Heads, Tensor]]] = []

    def __init__(self, shape: LayerShape, worse: bool = False) -> None:
        super().__init__(shape)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.worse = worse

    def attend(self, heads: Heads) -> Tensor:
        return self.gain * super().attend(heads)

    def calibrate(self, heads: Heads, target_BHND: Tensor) -> None:
        Gain.seen.append((heads, target_BHND))
        self.gain.data.fill_(100.0 if self.worse else 1.0)


@pytest.fixture(autouse=True)
def gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operators.OPERATORS, "gain", Gain)
    monkeypatch.setattr(Gain, "seen", [])


def teacher(family: str = "vit", **changes: Any) -> nn.Module:
    return dense.tiny(family, dtype=torch.float32, embed_dim=16, num_heads=2, **changes)


def errors(student: nn.Module) -> list[tuple[float, float]]:
    found = [layer.calibration for layer in converted_layers(student).values()]
    return [pair for pair in found if pair is not None]


@pytest.mark.parametrize("family", dense.FAMILIES)
def test_layers_see_what_the_teachers_layers_see(family: str) -> None:
    model = teacher(family)
    student = convert(model, "*: gain; 1: softmax", calibration=IMAGES)
    _, layers = dense.run(model, IMAGES)
    for (heads, target), layer in zip(Gain.seen, (layers[0], layers[2]), strict=True):
        torch.testing.assert_close(heads.q, layer.q)
        torch.testing.assert_close(heads.v, layer.v)
        torch.testing.assert_close(target, layer.out, rtol=1e-4, atol=1e-5)
    assert errors(student) == [(pytest.approx(0.5), pytest.approx(0, abs=1e-6))] * 2
    torch.testing.assert_close(student.eval()(IMAGES), model(IMAGES))


def test_a_calibration_that_makes_it_worse_is_taken_back() -> None:
    student = convert(teacher(), "0: gain(worse=true); 1: gain", calibration=IMAGES)
    assert errors(student)[0] == (pytest.approx(0.5), pytest.approx(0.5))
    assert [layer.operator.gain.item() for layer in converted_layers(student).values()] == [0.5, 1.0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", [case for case in CASES if case.operator != "softmax"], ids=str)
def test_no_operator_gets_worse(case: Any) -> None:
    student = convert(teacher(depth=2), f"*: {case}", calibration=IMAGES)
    assert len(errors(student)) == 2
    for before, after in errors(student):
        assert after <= before
    assert student(IMAGES).isfinite().all()


@pytest.mark.parametrize("operator", ["t2r", "hedgehog"])
def test_feature_maps_start_nearer(operator: str) -> None:
    student = convert(teacher(), f"*: {operator}", calibration=IMAGES)
    assert sum(after for _, after in errors(student)) < 0.99 * sum(before for before, _ in errors(student))


def test_fresh_projections_are_calibrated_on_the_teachers_inputs() -> None:
    model = teacher()
    student = convert(model, "*: gain", weights="mlp", calibration=IMAGES)
    _, layers = dense.run(model, IMAGES)
    heads, target = Gain.seen[2]
    torch.testing.assert_close(target, layers[2].out, rtol=1e-4, atol=1e-5)
    assert heads.q is not None
    assert not torch.allclose(heads.q, layers[2].q)
    assert len(errors(student)) == 3


def test_the_teacher_is_left_as_it_was() -> None:
    model = convert(teacher(attn_drop_rate=0.5), "1: gain").train()
    before = copy.deepcopy(model.state_dict())
    student = convert(model, "*: gain", calibration=IMAGES)
    assert model.training
    assert student.training
    assert list(converted_layers(model)) == [1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not errors(model)
    assert [after for _, after in errors(student)] == [pytest.approx(0, abs=1e-6)] * 3


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match="calibration images of 8x8 do not fit the model: Input height"
    ):
        convert(teacher(), "*: gain", calibration=dense.images(1, dtype=torch.float32, size=(8, 8)))
