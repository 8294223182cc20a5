"""The models of AttnZero have the published sizes, and are models of timm that train, save, load, resize and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load_weights
from graftvit.checkpoints.student import write_student
from graftvit.models import attnzero
from graftvit.models.conversion import plan_of, resize
from graftvit.models.converted import converted_layers
from graftvit.models.cost import attention_macs, count_layers, other_macs
from graftvit.models.families import sites
from graftvit.models.programs.program import FOUND
from graftvit.models.small import without_memory
from support.models.pyramids import images
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = [
    [cell.strip() for cell in line.strip("| ").split("|")]
    for line in (attnzero.__doc__ or "").splitlines()
    if line.startswith("| attnzero_")
]
PUBLISHED = {
    "attnzero_deit_t": (5.74, 1.14), "attnzero_deit_s": (22.10, 4.37), "attnzero_deit_b": (86.60, 17.43),
    "attnzero_pvt_t": (11.38, 2.03), "attnzero_pvt_s": (20.22, 4.02), "attnzero_pvt_m": (35.06, 7.02),
    "attnzero_pvt_l": (47.51, 10.36), "attnzero_swin_t": (28.30, 4.48), "attnzero_swin_s": (49.61, 8.75),
    "attnzero_swin_b": (87.78, 15.43),
}  # fmt: skip
"""Millions of parameters and billions of multiply-adds of AttnZero's code with 1,000 classes at 224 x 224."""
HOST_PARAMETERS = {
    "attnzero_deit_t": 5_717_416, "attnzero_deit_s": 22_050_664, "attnzero_deit_b": 86_567_656,
    "attnzero_swin_t": 28_288_354, "attnzero_swin_s": 49_606_258, "attnzero_swin_b": 87_768_224,
}  # fmt: skip
"""timm's own numbers of the models without programs."""
TINY: dict[str, dict[str, Any]] = {
    "attnzero_deit_b": {"embed_dim": 16, "depth": 5, "num_heads": 2},
    "attnzero_pvt_t": {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)},
    "attnzero_swin_b": {"embed_dim": 8, "depths": (1, 1, 3, 1), "num_heads": (1, 2, 4, 8), "window_size": 2},
}


def tiny(name: str, **more: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(name, **{**TINY[name], "num_classes": 3, "img_size": 64, **more}).eval()


def outlined(name: str, **arguments: Any) -> nn.Module:
    with without_memory():
        return timm.create_model(name, **arguments)


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module) -> int:
    return sum(attention_macs(model)) + other_macs(model)


QUICK = ("attnzero_deit_t", "attnzero_pvt_t", "attnzero_swin_t")
"""The larger sizes, which take seconds to build, are in the slow tests."""
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_the_published_ones(name: str) -> None:
    _, host, _, parameters, cost = next(row for row in ROWS if row[0] == name)
    model: Any = outlined(name)
    millions, billions = PUBLISHED[name]
    assert f"{parameters_of(model):,}" == parameters
    assert round(parameters_of(model) / 1e6, 2) == millions
    assert f"{multiply_adds(model) / 1e9:.3f} G" == cost
    assert multiply_adds(model) / 1e9 == pytest.approx(billions, rel=0.01)
    assert model.default_cfg["input_size"] == (3, 224, 224)
    if name in HOST_PARAMETERS:
        assert parameters_of(model) - HOST_PARAMETERS[name] == difference(model)
        assert parameters_of(outlined(host)) == HOST_PARAMETERS[name]


def difference(model: nn.Module) -> int:
    """Return what the programs add, a 3 x 3 convolution with a bias, less the biases of 13 x 13 positions of Swin."""
    found = sites(model)
    layers = [found[index] for index in converted_layers(model)]
    is_swin = hasattr(model, "layers")
    return sum(10 * site.width - (13 * 13 * site.num_heads if is_swin else 0) for site in layers)


def test_every_model_is_in_the_table() -> None:
    assert [row[0] for row in ROWS] == list(attnzero.default_cfgs) == list(PUBLISHED)


@pytest.mark.slow
def test_swin_b_at_384_is_the_published_one() -> None:
    model = outlined("attnzero_swin_b", img_size=384, window_size=12)
    assert parameters_of(model) == 87_891_880
    assert round(parameters_of(model) / 1e6, 2) == 87.89
    assert multiply_adds(model) / 1e9 == pytest.approx(46.30, rel=0.01)


@pytest.mark.parametrize("name", QUICK)
def test_at_384_only_position_tables_grow(name: str) -> None:
    small = outlined(name)
    large = outlined(name, img_size=384)
    grown = {
        key: parameter.numel() - small.get_parameter(key).numel()
        for key, parameter in large.named_parameters()
        if parameter.shape != small.get_parameter(key).shape
    }
    widths = {site.stage: site.width for site in sites(small)}
    expected = {
        "deit": {"pos_embed": (24 * 24 - 14 * 14) * widths[0]},
        "pvt": {
            f"stages.{stage}.pos_embed": ((96 >> stage) ** 2 - (56 >> stage) ** 2) * width
            for stage, width in widths.items()
        },
        "swin": {},
    }
    assert grown == expected[name.split("_")[1]]


def straight(layer: Any, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return AttnZero's layer in float64 for one image: O = Q * L2(L2(Q) Z(mm(V)' phi(K))), and a convolution of V."""
    batch, _, width = x_BNC.shape
    if hasattr(layer, "qkv") and layer.qkv is not None:
        q, k, v = layer.qkv(x_BNC).chunk(3, -1)
    else:
        q = layer.q(x_BNC)
        k, v = layer.kv(x_BNC).chunk(2, -1)
    image = v.transpose(1, 2).reshape(batch, width, *grid)
    q, k, heads_v = (x.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scaled = (heads_v - heads_v.min()) / (heads_v.max() - heads_v.min() + 1e-9)
    mixed = scaled.transpose(2, 3) @ (F.elu(k) + 1)
    mixed = (mixed - mixed.mean()) / mixed.std()
    out = q * F.normalize(F.normalize(q, dim=-1) @ mixed, dim=-1)
    conv = layer.operator.conv
    local = F.conv2d(image, conv.weight, conv.bias, padding=1, groups=width).flatten(2).transpose(1, 2)
    return layer.proj(out.transpose(1, 2).flatten(2) + local)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["attnzero_pvt_t", "attnzero_swin_b"])
def test_a_layer_is_the_published_formula(name: str) -> None:
    model = tiny(name).double()
    site, layer = sites(model)[0], converted_layers(model)[0]
    grid = site.shape.geometry.grid
    x_BNC = torch.randn(1, grid[0] * grid[1], site.width, dtype=torch.float64)
    out = layer(x_BNC, grid) if "pvt" in name else layer(x_BNC.unflatten(1, grid)).flatten(1, 2)
    torch.testing.assert_close(out, straight(layer, x_BNC, grid))
    assert layer.operator.program.text == FOUND["attnzero_105"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", TINY)
def test_an_image_gives_the_same_alone_and_in_a_batch(name: str) -> None:
    model, inputs = tiny(name), images((64, 64))
    with torch.no_grad():
        torch.testing.assert_close(model(inputs)[:1], model(inputs[:1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_the_model_is_one_of_timm(name: str) -> None:
    model, inputs = tiny(name, drop_path_rate=0.1), images((64, 64))
    tokens, maps = model.forward_intermediates(inputs)
    assert torch.equal(model.forward_head(tokens), model(inputs))
    assert maps
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()
    model.reset_classifier(5)
    assert model(inputs).shape == (2, 5)
    model.train()(inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", TINY)
def test_a_saved_model_is_loaded_at_any_size(tmp_path: Path, name: str) -> None:
    model, inputs = tiny(name), images((64, 64))
    arguments = {**TINY[name], "num_classes": 3, "img_size": 64}
    shown = Preprocessing.of(model, input_size=(3, 64, 64), mean=(0.4,) * 3, std=(0.2,) * 3)
    write_student(model, tmp_path / "saved", architecture=name, model_args=arguments, preprocessing=shown)
    with torch.no_grad():
        loaded = graftvit.load(tmp_path / "saved")
        torch.testing.assert_close(loaded(inputs), model.requires_grad_(False)(inputs))
        larger = graftvit.load(tmp_path / "saved", img_size=96)
        resize(model, 96)
        torch.testing.assert_close(larger(images((96, 96))), model(images((96, 96))))
    assert plan_of(loaded) == plan_of(model)


@pytest.mark.parametrize("name", TINY)
def test_a_larger_model_starts_from_a_smaller_one(tmp_path: Path, name: str) -> None:
    """The tables of positions and, with another window, of relative positions are resampled."""
    model = tiny(name)
    arguments = {**TINY[name], "num_classes": 3, "img_size": 64}
    shown = Preprocessing.of(model, input_size=(3, 64, 64), mean=(0.4,) * 3, std=(0.2,) * 3)
    write_student(model, tmp_path / "saved", architecture=name, model_args=arguments, preprocessing=shown)
    window = {"window_size": 4} if "swin" in name else {}
    larger = tiny(name, img_size=128, **window)
    for parameter in larger.parameters():
        nn.init.zeros_(parameter)
    load_weights(larger, str(tmp_path / "saved"))
    own = model.state_dict()
    for key, tensor in larger.state_dict().items():
        if key in own and tensor.shape == own[key].shape:
            torch.testing.assert_close(tensor, own[key])
        elif key.endswith(("pos_embed", "relative_position_bias_table")):
            assert tensor.abs().max() > 0, key
            assert tensor.mean() == pytest.approx(float(own[key].mean()), abs=2e-3)
    assert larger(images((128, 128))).shape == (2, 3)


def test_the_norms_are_the_rest_of_the_published_count() -> None:
    """AttnZero's counter also has 5 operations for each entry of a norm."""
    model = outlined("attnzero_swin_t")
    norms = count_layers(model).norm.multiplications // 3
    assert (multiply_adds(model) + 5 * norms) / 1e9 == pytest.approx(4.48, abs=0.01)
