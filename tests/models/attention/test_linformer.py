"""Linformer: its equation, its limit, and pooling that is shared, interpolated and saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import graftvit.checkpoints.pretrained as loading
import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.models.attention.base import Geometry, LayerShape
from graftvit.models.attention.linformer import LinformerAttention, interpolated
from graftvit.models.attention.softmax import softmax_rows
from graftvit.models.conversion import convert, converted_layers, new_parameters, plan_of, resize
from graftvit.models.errors import ConfigError
from safetensors.torch import load_model, save_model
from support.models import dense
from support.models.operator_cases import Case, coarse, draw
from torch import Tensor, nn

GRID = Geometry(2, (6, 8))
PLAN = "*: linformer(num_keys=6, sharing=layerwise); 3: linformer(num_keys=4, sharing=layerwise)"


def build(geometry: Geometry = GRID, **options: Any) -> LinformerAttention:
    return LinformerAttention(LayerShape(2, 8, geometry), **options)


def student(plan: str = PLAN) -> nn.Module:
    model = convert(dense.tiny(dtype=torch.float32, depth=5), plan).eval()
    with torch.no_grad():
        for parameter in new_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def operators(model: nn.Module) -> list[LinformerAttention]:
    return [cast(LinformerAttention, layer.operator) for layer in converted_layers(model).values()]


def images(size: tuple[int, int] | None = None) -> Tensor:
    return dense.images(2, dtype=torch.float32, **({} if size is None else {"size": size}))


@pytest.mark.parametrize(
    "options",
    [{}, {"sharing": "key-value"}, {"sharing": "layerwise", "num_keys": 5}, {"stochastic": True}],
    ids=str,
)
def test_the_output_is_the_equation(options: dict[str, Any]) -> None:
    operator, heads = Case("linformer", options).build(GRID), draw(GRID, size=2)
    q, k, v = heads.qkv()
    learned = [cast(Tensor, getattr(operator, f"{name}_pooling")) for name in ("key", "value")]
    keys_Mn = learned[0].softmax(1) if options.get("stochastic") else learned[0]
    values_Mn = keys_Mn if learned[1] is None else learned[1]
    values_Mn = values_Mn.softmax(1) if options.get("stochastic") and learned[1] is not None else values_Mn
    out = []
    for query in range(GRID.num_tokens):
        if query < 2:
            logits, values = heads.scale * (q[:, :, query, None] * k).sum(-1), v
        else:
            spread = [max(1.0, float(row.sum() ** 2 / (row**2).sum())) for row in keys_Mn.detach()]
            counts = torch.tensor([1.0, 1.0, *spread]).double().log()
            keys = torch.cat((k[:, :, :2], torch.einsum("mn,bhnd->bhmd", keys_Mn, k[:, :, 2:])), 2)
            logits = heads.scale * (q[:, :, query, None] * keys).sum(-1) + counts
            values = torch.cat((v[:, :, :2], torch.einsum("mn,bhnd->bhmd", values_Mn, v[:, :, 2:])), 2)
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        out.append((weights[..., None] * values).sum(2))
    torch.testing.assert_close(operator(heads), torch.stack(out, 2), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sharing", ["headwise", "key-value", "layerwise"])
def test_with_a_key_for_each_patch_it_is_softmax(sharing: str) -> None:
    operator, heads = build(num_keys=48, sharing=sharing).double(), draw(GRID, size=3)
    exact = softmax_rows(heads, slice(None))
    torch.testing.assert_close(operator.matrix(heads), exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("stochastic", [False, True])
def test_it_starts_as_means_of_a_grid_of_cells(stochastic: bool) -> None:
    geometry = Geometry(1, (14, 14))
    keys, values = build(geometry, stochastic=stochastic).pooling(geometry)
    assert keys.shape == values.shape == (49, 196)
    torch.testing.assert_close(keys.sum(1), torch.ones(49))
    own = keys.reshape(7, 7, 7, 2, 7, 2)
    inside = torch.stack([own[i, j, i, :, j, :].sum() for i in range(7) for j in range(7)])
    assert (inside > (0.98 if stochastic else 0.9999)).all()
    assert (keys > 0).all() == stochastic


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_at_the_start_it_is_softmax_where_keys_and_values_are_equal_in_each_cell(prefix: int) -> None:
    """Only with the log of the counts: cells of 4 and of 2 tokens here, and prefix tokens of one."""
    geometry = Geometry(prefix, (5, 4))
    heads = coarse(geometry, (3, 2))
    _, _, v = heads.qkv()
    operator = build(geometry, num_keys=6).double()
    exact = softmax_rows(heads, slice(None)) @ v
    torch.testing.assert_close(operator(heads), exact, rtol=1e-6, atol=1e-7)


def test_counts_follow_what_is_learned() -> None:
    """A row that comes to look at one token counts as one, not as the cell that it started from."""
    operator, heads = build(num_keys=4).double(), draw(GRID)
    q, k, v = heads.qkv()
    assert operator.key_pooling is not None
    with torch.no_grad():
        for pooling in operator.parameters():
            pooling.zero_()[range(4), [3, 9, 20, 41]] = 1.0
    chosen = torch.tensor([0, 1, 5, 11, 22, 43])
    logits = heads.scale * q[:, :, 2:] @ k[:, :, chosen].transpose(2, 3)
    torch.testing.assert_close(operator(heads)[:, :, 2:], logits.softmax(-1) @ v[:, :, chosen])


def test_a_row_of_zeros_has_a_gradient() -> None:
    operator, heads = build(num_keys=4).double(), draw(GRID)
    with torch.no_grad():
        for pooling in operator.parameters():
            pooling[1] = 0
    out = operator(heads)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(cast(Tensor, p.grad).isfinite().all() for p in operator.parameters())


@pytest.mark.parametrize("new", [(9, 12), (9, 16), (4, 5)], ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
def test_another_grid_on_the_fly_is_the_same_as_resampled(new: tuple[int, int], stochastic: bool) -> None:
    geometry = Geometry(2, new)
    operator, heads = Case("linformer", {"stochastic": stochastic}).build(GRID), draw(geometry)
    before = operator(heads)
    assert isinstance(operator, LinformerAttention)
    operator.resample(geometry)
    assert operator.shape.geometry == geometry
    assert cast(Tensor, operator.key_pooling).shape[1] == geometry.num_patches
    torch.testing.assert_close(operator(heads), before, rtol=1e-10, atol=1e-12)
    out = operator.matrix(heads).sum(-1)
    assert torch.allclose(out, torch.ones_like(out)) == stochastic


def test_rows_keep_their_sum_on_a_grid_one_and_a_half_times_as_large() -> None:
    """Without n_old / n_new they would sum to 2.25; at the border bilinear weights make it inexact."""
    means = build(Geometry(0, (8, 12)), num_keys=24).pooling(Geometry(0, (12, 18)))[0]
    torch.testing.assert_close(means.sum(1), torch.ones(24), rtol=0.15, atol=0)
    assert means.sum().item() == pytest.approx(24, rel=1e-4)
    image = torch.arange(12.0).reshape(1, 12).expand(2, 12)
    torch.testing.assert_close(interpolated(image, (1, 12), (3, 12)), image.repeat(1, 3) / 3)
    torch.testing.assert_close(interpolated(image, (12, 1), (12, 3))[0, 1::3] * 3, image[0])


def test_no_weight_is_lost_on_a_grid_a_third_as_large() -> None:
    """Plain bilinear interpolation would look at four of nine tokens."""
    sums = interpolated(torch.eye(144), (12, 12), (4, 4)).sum(1)
    assert float(sums.min()) > 0.3
    assert float(sums.mean()) == pytest.approx(1)


def test_a_resampled_start_is_the_start_on_the_other_grid() -> None:
    """Cells of 2x2 tokens stretched to 3x3: the same cells, softened at their edges."""
    operator, other = build(Geometry(1, (8, 12))), build(Geometry(1, (12, 18)), num_keys=24)
    found = operator.pooling(Geometry(1, (12, 18)))[0]
    wanted = other.pooling(Geometry(1, (12, 18)))[0]
    assert found.shape == wanted.shape
    assert ((found - wanted).norm() / wanted.norm()).item() < 0.5
    assert torch.equal(found.argmax(1), (found * (wanted > 0)).argmax(1))


def test_one_pooling_for_all_layers_with_the_same_options() -> None:
    model = student()
    names = [name for name, _ in model.named_parameters() if "pooling" in name]
    assert names == ["blocks.0.attn.operator.key_pooling", "blocks.3.attn.operator.key_pooling"]
    assert [key for key in model.state_dict() if "pooling" in key] == names
    first, _, _, other, last = operators(model)
    geometry = first.shape.geometry
    before = model(images())
    with torch.no_grad():
        cast(Tensor, first.key_pooling).mul_(0.5)
    assert torch.equal(first.pooling(geometry)[0], last.pooling(geometry)[0])
    assert not torch.equal(before, model(images()))
    assert other.pooling(geometry)[0].shape != first.pooling(geometry)[0].shape


def test_the_shared_pooling_learns_from_every_layer() -> None:
    """Its gradient is the sum of those of layers that have the same pooling each for itself."""
    shared = student("*: linformer(sharing=layerwise)")
    alone = copy.deepcopy(shared)
    for operator in operators(alone)[1:]:
        operator._first = (copy.deepcopy(operators(alone)[0]),)
    gradients = []
    for model in (shared, alone):
        kept = [operator._first[0] if operator._first else operator for operator in operators(model)]
        poolings = list({id(owner): cast(Tensor, owner.key_pooling) for owner in kept}.values())
        loss = cast(Any, model).forward_features(images()).square().sum()
        gradients.append(torch.autograd.grad(loss, poolings))
    assert [len(found) for found in gradients] == [1, 5]
    assert all(found.any() for found in gradients[1])
    torch.testing.assert_close(gradients[0][0], torch.stack(gradients[1]).sum(0), rtol=1e-3, atol=1e-5)


def test_a_copy_shares_with_itself_alone() -> None:
    model = student()
    twin = copy.deepcopy(model)
    assert operators(twin)[1]._first == (operators(twin)[0],)
    expected = model(images())
    assert torch.equal(twin(images()), expected)
    with torch.no_grad():
        cast(Tensor, operators(twin)[0].key_pooling).zero_()
    assert torch.equal(model(images()), expected)
    assert not torch.allclose(twin(images()), expected)


def test_shared_pooling_is_moved_with_the_model() -> None:
    model = student().double()
    geometry = operators(model)[0].shape.geometry
    assert {operator.pooling(geometry)[0].dtype for operator in operators(model)} == {torch.float64}
    assert model(images().double()).dtype == torch.float64


def test_shared_pooling_is_saved_once_and_loaded(tmp_path: Path) -> None:
    model = student()
    name, arguments = dense.FAMILIES["vit"]
    arguments = {**dense.TINY, **arguments, "depth": 5}
    save_model(model, str(tmp_path / "w.safetensors"))
    again = timm.create_model("graftvit_converted", architecture=name, plan=plan_of(model), **arguments)
    load_model(again, str(tmp_path / "w.safetensors"))
    assert torch.equal(again.eval()(images()), model(images()))
    folder = tmp_path / "student"
    write_student(
        model,
        folder,
        architecture=name,
        model_args=arguments,
        preprocessing=Preprocessing.of(model, mean=(0.5,) * 3, std=(0.5,) * 3),
    )
    loaded = loading.load(str(folder))
    assert torch.equal(loaded(images()), model(images()))
    assert operators(loaded)[4]._first == (operators(loaded)[0],)


def test_a_resized_model_shares_still(tmp_path: Path) -> None:
    model = student()
    size = (48, 72)
    resize(model, size)
    first = operators(model)[0]
    assert cast(Tensor, first.key_pooling).shape[1] == first.shape.geometry.num_patches
    assert [operator.shape.geometry for operator in operators(model)] == [first.shape.geometry] * 5
    assert operators(model)[2].pooling(first.shape.geometry)[0].shape == cast(Tensor, first.key_pooling).shape
    assert model(images(size)).isfinite().all()


def test_other_sharing_is_of_a_layer_alone() -> None:
    for sharing, count in (("headwise", 2), ("key-value", 1)):
        model = student(f"*: linformer(sharing={sharing})")
        assert len(new_parameters(model)) == 5 * count
        assert len({id(parameter) for parameter in new_parameters(model)}) == 5 * count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_keys": 49}, "num_keys=49; give a whole number from 1 to 48"),
        ({"num_keys": 0}, "num_keys=0"),
        ({"num_keys": True}, "num_keys=True"),
        ({"sharing": "layer"}, "sharing=layer; did you mean 'layerwise'"),
        ({"stochastic": "yes"}, "stochastic=yes; valid: true, false"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"plan: {message}"):
        build(**options)


@pytest.mark.parametrize(("tokens", "grid", "num_keys", "ratio"), [
    (197, (14, 14), 64, 0.65), (1025, (32, 32), 64, 0.12), (197, (14, 14), None, 0.5),
])  # fmt: skip
def test_the_cost_against_softmax(
    tokens: int, grid: tuple[int, int], num_keys: int | None, ratio: float
) -> None:
    geometry = Geometry(1, grid)
    operator = LinformerAttention(LayerShape(1, 64, geometry), num_keys)
    assert operator.macs(geometry) / (2 * tokens**2 * 64) == pytest.approx(ratio, abs=0.02)
