"""Calibration and fitting on the teacher's own inputs: what each layer is given, and that no layer gets worse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from graftvit.checkpoints.student import FittedLayers, only_fitted
from graftvit.models import layer_plan as operators
from graftvit.models.attention.base import Fit, Heads, LayerShape, Projections
from graftvit.models.attention.hash import HashAttention
from graftvit.models.attention.softmax import SoftmaxAttention
from graftvit.models.calibration import Layer, fit_at_random, fit_layers
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.errors import UnsupportedModelError
from support.models import dense, pyramids
from support.models.operator_cases import CASES
from support.models.tiny_students import same_weights
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
    with pytest.raises(UnsupportedModelError, match="calibration images of 8x8 do not fit the model"):
        convert(teacher(), "*: gain", calibration=dense.images(1, dtype=torch.float32, size=(8, 8)))


# Conversion to an operator that must be fitted: by layer, from a seed, resumed, and its start.


def hashes(model: nn.Module) -> list[HashAttention]:
    found = [layer.operator for layer in converted_layers(model).values()]
    assert all(isinstance(each, HashAttention) for each in found)
    return found  # type: ignore[return-value]


def test_each_layer_is_fitted_to_what_the_teachers_layer_sees() -> None:
    """So no layer depends on another one, and the seed decides."""
    whole = convert(teacher(), "*: hash", calibration=IMAGES, seed=5)
    alone = convert(teacher(), "2: hash", calibration=IMAGES, seed=5)
    other = convert(teacher(), "2: hash", calibration=IMAGES, seed=6)
    last = hashes(whole)[2]
    assert same_weights(last, hashes(alone)[0])
    assert not torch.equal(last.weight, hashes(other)[0].weight)
    _, layers = dense.run(teacher(), IMAGES)
    u = torch.nn.functional.normalize(layers[2].q, dim=-1)
    away = (last.anchors[:, :, None, None] - u.transpose(0, 1)[:, None]).abs().amax(-1)
    assert (away.amin((2, 3)) < 1e-4).all()
    fit = converted_layers(whole)[2].fit
    assert fit is not None
    assert set(fit.measures) == {"objective", "correlation", "accepted"}
    assert str(fit).startswith(f"objective {fit.measures['objective'][0]:.3f} -> ")


def test_a_student_without_a_teacher_is_fitted_layer_by_layer() -> None:
    """Each layer to what the layers before it give, when these are fitted already."""
    student = convert(teacher(), "*: hash")
    with pytest.raises(UnsupportedModelError, match="not fitted"):
        student(IMAGES)
    fit_layers(student, converted_layers(student), IMAGES, seed=0)
    first = hashes(convert(teacher(), "*: hash", calibration=IMAGES))
    assert same_weights(hashes(student)[0], first[0])
    assert not torch.equal(hashes(student)[1].anchors, first[1].anchors)
    assert student(IMAGES).isfinite().all()


def test_for_measurements_of_speed_codes_are_random() -> None:
    student = convert(teacher(), "0: hash; 1: linear", calibration=IMAGES)
    fitted = hashes(convert(teacher(), "0: hash", calibration=IMAGES))[0]
    fit_at_random(converted_layers(student))
    assert torch.equal(converted_layers(student)[0].operator.weight, fitted.weight)  # type: ignore[arg-type]
    student = convert(teacher(), "*: hash")
    fit_at_random(converted_layers(student))
    assert student(IMAGES).isfinite().all()


def start_rows(family: str, start: str) -> tuple[Tensor, Tensor, Tensor]:
    """The query rows of a converted layer with their biases, and those of queries and keys in the teacher."""
    model = teacher(family)
    student = convert(model, f"*: hash(start={start})")
    original = model.get_submodule("blocks.1.attn")
    layers = [Projections(each) for each in (converted_layers(student)[1].original, original)]

    def rows(projections: Projections, part: str) -> Tensor:
        bias = projections.bias(part)
        weight = projections.weight(part)
        column = weight.new_zeros(len(weight), 1) if bias is None else bias[:, None]
        return torch.cat([weight, column], 1).double()

    return rows(layers[0], "q"), rows(layers[1], "q"), rows(layers[1], "k")


@pytest.mark.parametrize("family", ["vit", "dinov2_registers", "eva02"])
def test_the_shared_projection_starts_from_queries_keys_or_their_mean(family: str) -> None:
    wanted: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "q": lambda q, k: q, "k": lambda q, k: k, "mean": lambda q, k: (q + k) / 2,
    }  # fmt: skip
    for start, rows in wanted.items():
        found, q, k = start_rows(family, start)
        torch.testing.assert_close(found, rows(q, k), rtol=1e-5, atol=1e-6)


def test_the_symmetric_start_is_the_nearest_positive_map() -> None:
    """Of rank D, the eigenvectors of the largest eigenvalues of (QᵀK + KᵀQ) / 2 leave the least error."""
    found, q, k = start_rows("vit", "symmetric")
    for own, q_DC, k_DC in zip(found.chunk(2), q.chunk(2), k.chunk(2), strict=True):
        symmetric = (q_DC.T @ k_DC + k_DC.T @ q_DC) / 2
        values = torch.linalg.eigvalsh(symmetric)
        kept = values.clamp_min(0)
        kept[: -len(q_DC)] = 0
        error = (own.T @ own - symmetric).square().sum()
        torch.testing.assert_close(error, (values - kept).square().sum(), rtol=1e-4, atol=1e-6)


def test_a_pyramid_keeps_queries_and_values() -> None:
    model: Any = pyramids.tiny("pvt")
    images = pyramids.images((32, 32))
    student: Any = convert(
        model, "stage1: hash(mode=reference); stage2: hash(start=mean)", calibration=images
    )
    own, attention = model.stages[1].blocks[0].attn, student.stages[1].blocks[0].attn
    torch.testing.assert_close(attention.q.weight, (own.q.weight + own.kv.weight[:16]) / 2)
    assert torch.equal(attention.kv.weight, own.kv.weight[16:])
    with pytest.raises(UnsupportedModelError, match=r"lost the rows of k .* `graftvit convert`"):
        attention.operator.adopt(Projections(attention.original, attention.kept))
    assert student(images).isfinite().all()


class Stops(FittedLayers):
    """Is stopped after the first layer."""

    def save(self, index: int, key: str, layer: Layer) -> None:
        super().save(index, key, layer)
        raise KeyboardInterrupt


def test_finished_layers_are_not_fitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(teacher(), "*: hash", calibration=IMAGES)
    with pytest.raises(KeyboardInterrupt):
        convert(teacher(), "*: hash", calibration=IMAGES, finished=Stops(tmp_path))
    assert only_fitted(tmp_path)
    fits: list[Fit] = []
    fit = HashAttention.fit
    monkeypatch.setattr(
        HashAttention, "fit", lambda *given, **named: fits.append(fit(*given, **named)) or fits[-1]
    )  # type: ignore[func-returns-value]
    again = convert(teacher(), "*: hash", calibration=IMAGES, finished=FittedLayers(tmp_path))
    assert len(fits) == 2
    assert same_weights(again, whole)
    for index, layer in converted_layers(again).items():
        assert layer.fit == converted_layers(whole)[index].fit
        assert layer.calibration == converted_layers(whole)[index].calibration
    for changes in ({"seed": 1}, {"calibration": IMAGES[:3]}):
        fits.clear()
        convert(teacher(), "0: hash", finished=FittedLayers(tmp_path), **{"calibration": IMAGES, **changes})  # type: ignore[arg-type]
        assert len(fits) == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_file_is_fitted_again(damage: str, tmp_path: Path) -> None:
    one, finished = convert(teacher(), "1: hash", calibration=IMAGES), FittedLayers(tmp_path)
    convert(teacher(), "1: hash", calibration=IMAGES, finished=finished)
    path = tmp_path / "fit" / "layer01.safetensors"
    path.write_bytes({"truncated": path.read_bytes()[:-7], "empty": b"", "text": b"{}"}[damage])
    assert same_weights(convert(teacher(), "1: hash", calibration=IMAGES, finished=finished), one)
