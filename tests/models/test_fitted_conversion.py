"""Conversion to an operator that must be fitted: by layer, from a seed, resumed, and its start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from graftvit.checkpoints.student import FittedLayers, only_fitted
from graftvit.models.attention.base import Fit, Projections
from graftvit.models.attention.hash import HashAttention
from graftvit.models.calibration import Layer, fit_at_random, fit_layers
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.errors import UnsupportedModelError
from graftvit.models.small import without_memory
from support.models import dense
from torch import Tensor, nn

IMAGES = dense.images(4, dtype=torch.float32)
PVT = {
    "depths": (1, 1, 1, 1),
    "embed_dims": (8, 16, 16, 16),
    "num_heads": (1, 2, 2, 2),
    "mlp_ratios": (2,) * 4,
}


def teacher(family: str = "vit") -> nn.Module:
    return dense.tiny(family, dtype=torch.float32, embed_dim=16, num_heads=2)


def hashes(model: nn.Module) -> list[HashAttention]:
    found = [layer.operator for layer in converted_layers(model).values()]
    assert all(isinstance(each, HashAttention) for each in found)
    return found  # type: ignore[return-value]


def same(one: nn.Module, other: nn.Module) -> bool:
    others = other.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in one.state_dict().items())


def test_each_layer_is_fitted_to_what_the_teachers_layer_sees() -> None:
    """So no layer depends on another one, and the seed decides."""
    whole = convert(teacher(), "*: hash", calibration=IMAGES, seed=5)
    alone = convert(teacher(), "2: hash", calibration=IMAGES, seed=5)
    other = convert(teacher(), "2: hash", calibration=IMAGES, seed=6)
    last = hashes(whole)[2]
    assert same(last, hashes(alone)[0])
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
    assert same(hashes(student)[0], first[0])
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
        "q": lambda q, k: q,
        "k": lambda q, k: k,
        "mean": lambda q, k: (q + k) / 2,
    }
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
    model = timm.create_model("pvt_v2_b0", num_classes=3, **PVT).eval()
    images = torch.randn(2, 3, 224, 224)
    student = convert(model, "stage3: hash(start=mean); stage4: hash(mode=reference)", calibration=images)
    own, attention = model.stages[2].blocks[0].attn, student.stages[2].blocks[0].attn
    torch.testing.assert_close(attention.q.weight, (own.q.weight + own.kv.weight[:16]) / 2)
    assert torch.equal(attention.kv.weight, own.kv.weight[16:])
    with pytest.raises(
        UnsupportedModelError, match="lost the rows of k in its conversion: run `graftvit convert`"
    ):
        attention.operator.adopt(Projections(attention.original, attention.kept))
    assert student(images).isfinite().all()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("pvt_v2_b0", 3_136_328),
        ("pvt_v2_b1", 11_891_368),
        ("pvt_v2_b2", 20_367_528),
        ("pvt_v2_b3", 34_084_008),
        ("pvt_v2_b4", 45_665_704),
        ("twins_svt_small", 21_522_088),
    ],
)
def test_parameters_are_those_of_the_published_models(name: str, parameters: int) -> None:
    with without_memory():
        model = timm.create_model(name)
    last = "softmax" if "twins" in name else "keep"
    student = convert(model, f"stage1: hash; stage2: hash; stage3: hash; stage4: {last}")
    assert sum(parameter.numel() for parameter in student.parameters()) == parameters


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
    assert same(again, whole)
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
    assert same(convert(teacher(), "1: hash", calibration=IMAGES, finished=finished), one)
