"""The models that timm lacks have their published sizes, compute their papers' equations, and are models of timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.formats.lit_keys import from_reference, to_reference
from graftvit.checkpoints.pretrained import load_weights
from graftvit.models import attnzero, lit, pvt_models, small
from graftvit.models.conversion import convert, plan_of, resize
from graftvit.models.converted import converted_layers
from graftvit.models.cost import attention_macs, count_layers, other_macs
from graftvit.models.errors import ConfigError
from graftvit.models.families import attention_shape, sites
from graftvit.models.merges import merge_layers
from graftvit.models.programs.program import FOUND
from graftvit.models.small import without_memory
from support.models.dense import FAMILIES
from support.models.dense import TINY as PLAIN
from support.models.golden import golden_images, golden_state
from support.models.pyramids import images
from support.models.pyramids import tiny as tiny_pyramid
from support.models.tiny_students import save_folder
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


def table(module: Any, *starts: str) -> dict[str, list[str]]:
    """By name: the cells of the rows of a module's docstring."""
    rows = [
        line for line in module.__doc__.splitlines() if line.startswith(tuple(f"| {each}" for each in starts))
    ]
    cells = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]
    return {row[0]: row[1:] for row in cells}


ATTNZERO, LIT = table(attnzero, "attnzero_"), table(lit, "lit_", "litv2_")
PVT, SMALL = table(pvt_models, "pvt_"), table(small, "vit_")
PUBLISHED = {
    "attnzero_deit_t": (5.74, 1.14), "attnzero_deit_s": (22.10, 4.37), "attnzero_deit_b": (86.60, 17.43),
    "attnzero_deit_t_bias": (5.92, 1.14), "attnzero_autoformer_t": (5.74, 1.15), "attnzero_pvt_t_bias": (11.54, 2.03),
    "attnzero_swin_t_bias": (28.55, 4.48),
    "attnzero_pvt_t": (11.38, 2.03), "attnzero_pvt_s": (20.22, 4.02), "attnzero_pvt_m": (35.06, 7.02),
    "attnzero_pvt_l": (47.51, 10.36), "attnzero_swin_t": (28.30, 4.48), "attnzero_swin_s": (49.61, 8.75),
    "attnzero_swin_b": (87.78, 15.43),
    **dict.fromkeys(("attnzero_cswin_t", "attnzero_cswin_t_140"), (20.39, 4.32)),
    **dict.fromkeys(("attnzero_cswin_s", "attnzero_cswin_s_140"), (32.72, 6.79)),
    **dict.fromkeys(("attnzero_cswin_b", "attnzero_cswin_b_140"), (73.05, 14.91)),
}  # fmt: skip
"""Millions of parameters and billions of multiply-adds of AttnZero's code with 1,000 classes at 224 x 224."""
HOST_PARAMETERS = {
    "attnzero_deit_t": 5_717_416, "attnzero_deit_s": 22_050_664, "attnzero_deit_b": 86_567_656,
    "attnzero_swin_t": 28_288_354, "attnzero_swin_s": 49_606_258, "attnzero_swin_b": 87_768_224,
}  # fmt: skip
"""timm's own numbers of the models without programs."""
QUICK = (
    "attnzero_deit_t", "attnzero_pvt_t", "attnzero_swin_t", "attnzero_deit_t_bias", "attnzero_pvt_t_bias",
    "attnzero_swin_t_bias", "attnzero_autoformer_t",
)  # fmt: skip
"""The larger sizes, which take seconds to build, are in the slow tests."""
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
STAGES = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)}
WINDOWS = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
TINY: dict[str, dict[str, Any]] = {
    "attnzero_deit_b": {"embed_dim": 16, "depth": 5, "num_heads": 2},
    "attnzero_autoformer_t": {"embed_dim": 24, "num_heads": (3, 4, 3), "mlp_ratio": (3, 4, 3.5)},
    "attnzero_pvt_t": STAGES,
    "attnzero_deit_t_bias": {"embed_dim": 16, "depth": 2, "num_heads": 2},
    "attnzero_pvt_t_bias": STAGES,
    "attnzero_swin_t_bias": {**WINDOWS, "window_size": 2},
    "attnzero_swin_b": {**WINDOWS, "depths": (1, 1, 3, 1), "window_size": 2},
    "attnzero_cswin_t": {**WINDOWS, "num_heads": (2, 2, 4, 8), "split_size": (0, 0, 2, 2)},
    "lit_ti": STAGES,
    "lit_s": WINDOWS,
    "litv2_s": WINDOWS,
}
HOSTED = [name for name in TINY if name.startswith("attnzero")]
MERGED = [name for name in TINY if name not in HOSTED]
tiny_models = pytest.mark.parametrize("name", TINY)


def tiny(name: str, **more: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(name, **{**TINY[name], "num_classes": 3, "img_size": 64, **more}).eval()


def outlined(name: str, **arguments: Any) -> Any:
    with without_memory():
        return timm.create_model(name, **arguments)


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module) -> int:
    return sum(attention_macs(model)) + other_macs(model)


def save(model: nn.Module, name: str, folder: Path) -> str:
    arguments = {**TINY[name], "num_classes": 3, "img_size": 64}
    shown = {"input_size": (3, 64, 64), "mean": (0.4,) * 3, "std": (0.2,) * 3}
    return save_folder(model, folder, name, arguments, shown)


def test_every_model_is_in_its_table() -> None:
    for module, rows in ((attnzero, ATTNZERO), (lit, LIT), (pvt_models, PVT), (small, SMALL)):
        assert list(rows) == list(module.default_cfgs)
        assert all(timm.is_model(name) for name in rows)
    assert ATTNZERO.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_attnzero_are_the_published_ones(name: str) -> None:
    host, _, parameters, cost = ATTNZERO[name]
    model = outlined(name)
    millions, billions = PUBLISHED[name]
    assert f"{parameters_of(model):,}" == parameters
    assert round(parameters_of(model) / 1e6, 2) == millions
    assert f"{multiply_adds(model):,}" == cost
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
        if parameter.shape != small.get_parameter(key).shape and not key.endswith(("ha_bias", "wa_bias"))
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
    assert grown == expected[name.split("_")[1].replace("autoformer", "deit")]


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


def test_the_norms_are_the_rest_of_the_published_count() -> None:
    """AttnZero's counter also has 5 operations for each entry of a norm."""
    model = outlined("attnzero_swin_t")
    norms = count_layers(model).norm.multiplications // 3
    assert (multiply_adds(model) + 5 * norms) / 1e9 == pytest.approx(4.48, abs=0.01)


@tiny_models
def test_it_is_a_model_of_timm(name: str) -> None:
    model, inputs = tiny(name, drop_path_rate=0.1), images((64, 64))
    tokens, maps = model.forward_intermediates(inputs)
    assert torch.equal(model.forward_head(tokens), model(inputs))
    assert maps
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        torch.testing.assert_close(model(inputs)[:1], model(inputs[:1]), rtol=1e-4, atol=1e-6)
    model.reset_classifier(5)
    assert model(inputs).shape == (2, 5)
    model.train()(inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@tiny_models
def test_a_saved_model_is_loaded_at_any_size(tmp_path: Path, name: str) -> None:
    model, inputs, size = tiny(name), images((64, 64)), 96 if name in HOSTED else (64, 96)
    folder = save(model, name, tmp_path / "saved")
    with torch.no_grad():
        loaded = graftvit.load(folder)
        torch.testing.assert_close(loaded(inputs), model.requires_grad_(False)(inputs))
        larger = graftvit.load(folder, img_size=size)
        resize(model, size)
        given = images((96, 96) if name in HOSTED else (64, 96))
        torch.testing.assert_close(larger(given), model(given))
    assert plan_of(loaded) == plan_of(model)


@pytest.mark.parametrize("name", HOSTED)
def test_a_larger_model_starts_from_a_smaller_one(tmp_path: Path, name: str) -> None:
    """The tables of positions and, with another window, of relative positions are resampled."""
    model = tiny(name)
    larger = tiny(name, img_size=128, **({"window_size": 4} if "_swin_" in name else {}))
    for parameter in larger.parameters():
        nn.init.zeros_(parameter)
    load_weights(larger, save(model, name, tmp_path / "saved"))
    own = model.state_dict()
    for key, tensor in larger.state_dict().items():
        if key in own and tensor.shape == own[key].shape:
            torch.testing.assert_close(tensor, own[key])
        elif key.endswith(("pos_embed", "relative_position_bias_table")):
            assert tensor.abs().max() > 0, key
            assert tensor.mean() == pytest.approx(float(own[key].mean()), abs=2e-3)
    assert larger(images((128, 128))).shape == (2, 3)


@pytest.mark.parametrize("name", MERGED)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny(name, drop_path_rate=0.0).train()
        model.set_grad_checkpointing(checkpointed)
        model(images((64, 64))).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    torch.testing.assert_close(*gradients)


# LIT is what its authors published: parameters, multiply-adds, logits and offsets.

SWIN_LIKE = {
    "lit_s": (4_081_669_692, 0), "lit_m": (8_599_300_000, 1e-5), "lit_b": (15_036_700_000, 1e-5),
    "litv2_s": (3.734e9, 3e-4), "litv2_m": (7.479e9, 3e-4), "litv2_b": (13.194e9, 3e-4),
}  # fmt: skip
"""Published multiply-adds, and how far ours may be from them."""


@pytest.mark.parametrize("name", LIT)
def test_parameters_of_lit_to_the_integer(name: str) -> None:
    _, parameters, drop_path = LIT[name]
    model = outlined(name)
    assert f"{parameters_of(model):,}" == parameters
    assert sites(model)[-1].block(model).drop_path2.drop_prob == pytest.approx(float(drop_path))  # type: ignore[union-attr]
    assert model.default_cfg["input_size"] == (3, 224, 224)


def swin_extras(model: nn.Module, offset_channels: int) -> int:
    """Return what the authors of LIT-S, M and B count beside weights and attention: norms, biases, offsets."""
    found = sites(model)
    tokens = {site.stage: site.shape.geometry.num_patches for site in found}
    widths = {site.stage: site.width for site in found}
    norms = sum((1 + (site.stage > 1)) * site.width * tokens[site.stage] for site in found)
    ends = widths[0] * tokens[0] + widths[3] * tokens[0] // 16
    merges = sum(
        2 * widths[i] * tokens[i] + offset_channels * tokens[i] for i in (1, 2, 3)
    )  # bias and batch norm
    more = sum((offset_channels - 8) * 4 * widths[i - 1] * tokens[i] for i in (1, 2, 3))
    return norms + ends + merges + more


@pytest.mark.parametrize("name", SWIN_LIKE)
def test_multiply_adds_of_lit_are_the_published_ones(name: str) -> None:
    """The authors of LITv2 project the pooled tokens. We project all tokens, then pool: 3/4 of these are more."""
    model = outlined(name)
    more = 0
    for site in sites(model) if "v2" in name else ():
        tokens = site.shape.geometry.num_tokens
        more += 4 * site.width * tokens  # biases of the depthwise convolutions
        if site.stage == 2:
            low = int(0.9 * site.num_heads) * site.head_dim
            more -= 2 * low * site.width * tokens * 3 // 4
    published, tolerance = SWIN_LIKE[name]
    assert multiply_adds(model) + swin_extras(model, 12) + more == pytest.approx(published, rel=tolerance)
    if name == "lit_s":
        assert multiply_adds(model) + swin_extras(model, 8) == 4_079_558_184


def test_multiply_adds_of_lit_ti() -> None:
    model = outlined("lit_ti")
    assert sum(attention_macs(model)) == 155_197_440
    found = sites(model)
    norms = sum((1 + (site.stage > 1)) * 2 * site.width * site.shape.geometry.num_tokens for site in found)
    ends = 2 * (3136 * 64 + 50 * 512)
    merges = sum(tokens * (width + 8 + 2 * width) for tokens, width in ((784, 128), (196, 320), (49, 512)))
    assert multiply_adds(model) + norms + ends + 3136 * 64 + merges == 3_618_788_648


def test_logits_and_offsets_of_lit_ti_are_the_references() -> None:
    model: Any = timm.create_model("lit_ti").eval()
    published = golden_state(to_reference(model))
    assert len(published) == 190
    model.load_state_dict(from_reference(published))
    offsets: list[torch.Tensor] = []
    for merge in merge_layers(model):
        merge.dconv.conv_offset.register_forward_hook(lambda module, given, out: offsets.append(out))
    with torch.no_grad():
        logits = model(golden_images(224))
    first = [-0.285823, 1.683032, -0.074269, 0.180008, 1.057045, 0.705491, 1.728059, -0.563708]
    torch.testing.assert_close(logits[0, :8], torch.tensor(first), rtol=0, atol=2e-4)
    second = [-0.260917, 1.575102, -0.119641, -0.057239]
    torch.testing.assert_close(logits[1, :4], torch.tensor(second), rtol=0, atol=2e-4)
    assert float(logits[0].sum()) == pytest.approx(0.62149, abs=2e-3)
    place = [-0.121487, 0.109814, -0.408651, 0.753407, -0.364841, -0.261863, -0.068938, -0.962897]
    torch.testing.assert_close(offsets[0][0, :, 0, 0], torch.tensor(place), rtol=0, atol=1e-4)
    means = torch.stack([each.abs().mean() for each in offsets])
    torch.testing.assert_close(means, torch.tensor([0.374375, 0.591108, 1.358162]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MERGED)
def test_a_lit_is_a_pyramid_that_merges_deformably(name: str) -> None:
    model, inputs = tiny(name), images((64, 64))
    assert len({site.stage for site in sites(model)}) > 1
    assert str(plan_of(model)).endswith("; merge: deformable")
    maps = model.forward_intermediates(inputs)[1]
    assert [tuple(each.shape[2:]) for each in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    features = timm.create_model(name, features_only=True, img_size=64, out_indices=(1, 3), **TINY[name])
    assert [tuple(each.shape[2:]) for each in features(inputs)] == [(8, 8), (2, 2)]
    undecayed = {key for key, _ in model.named_parameters() if any(w in key for w in model.no_weight_decay())}
    expected = {"lit_ti": {"cls_token"}, "lit_s": {"relative_position_bias_table"}, "litv2_s": set()}
    assert {key.rpartition(".")[2] for key in undecayed} == expected[name]


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("size", [(96, 64), (72, 104)])
def test_any_size_of_images(name: str, size: tuple[int, int]) -> None:
    """72 x 104 has 18 x 26, 9 x 13, 4 x 6 and 2 x 3 tokens."""
    model = tiny(name)
    resize(model, size)
    assert model(images(size)).shape == (2, 3)
    assert tiny(name, img_size=size)(images(size)).shape == (2, 3)
    sided = [site.shape.geometry.grid for site in sites(model) if site.place == 0]
    assert sided == [tuple(side // step for side in size) for step in (4, 8, 16, 32)]


@pytest.mark.parametrize("name", ["lit_ti", "lit_s"])
def test_softmax_of_a_lit_can_become_another_operator(name: str) -> None:
    model, inputs = tiny(name), images((64, 64))
    student = convert(model, "stage3: linear", without=["bias"])
    again = timm.create_model(
        "graftvit_converted", architecture=name, plan=plan_of(student), without=["bias"],
        **TINY[name], num_classes=3, img_size=64,
    ).eval()  # fmt: skip
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(inputs), student(inputs))
    assert plan_of(again) == plan_of(student)
    assert torch.equal(convert(model, "stage3: keep")(inputs), model(inputs))


# PVT has the published sizes, computes its equations, and has the interface of timm's models.

MILLIONS = {"pvt_tiny": 13.2, "pvt_small": 24.5, "pvt_medium": 44.2, "pvt_large": 61.4}
"""Parameters in table 1 of the paper."""
SIZE = (32, 32)


def count(depths: tuple[int, ...], reductions: tuple[int, ...]) -> int:
    """Return the parameters by hand, for 1,000 classes at 224 x 224."""
    total, before, patch, tokens = 0, 3, 4, 56 * 56
    for width, ratio, depth, reduction in zip(
        (64, 128, 320, 512), (8, 8, 4, 4), depths, reductions, strict=True
    ):
        total += patch**2 * before * width + width + 2 * width + tokens * width
        block = 4 * width * (width + 1) + 2 * ratio * width**2 + ratio * width + width + 4 * width
        block += reduction**2 * width**2 + 3 * width if reduction > 1 else 0
        total += depth * block
        before, patch, tokens = width, 2, tokens // 4
    return total + 2 * 512 + 2 * 512 + 513 * 1000


def test_counts_of_pvt_to_the_integer() -> None:
    for name, (depths, parameters) in PVT.items():
        found = parameters_of(outlined(name))
        by_hand = count(tuple(map(int, depths.split(","))), (1,) * 4 if "full" in name else (8, 4, 2, 1))
        assert f"{found:,}" == parameters == f"{by_hand:,}"
        assert name not in MILLIONS or round(found / 1e6, 1) == MILLIONS[name]


def dense(model: Any, x: Tensor) -> Tensor:
    """Return the logits by the equations of the paper, one step a line."""
    state = model.state_dict()

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        normed = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
        return normed * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def patches(x: Tensor, name: str, eps: float) -> Tensor:
        """Cut (B, H, W, C) into squares, and project and normalize each."""
        projection = name.replace("norm", "sr" if "attn" in name else "proj")
        weight, bias = state[f"{projection}.weight"], state[f"{projection}.bias"]
        side = weight.shape[2]
        cut = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # B, h, side, w, side, C
        return norm(torch.einsum("bhiwjc,dcij->bhwd", cut, weight) + bias, name, eps)

    for i, stage in enumerate(model.stages):
        x = patches(x, f"stages.{i}.downsample.norm" if i else "patch_embed.norm", 1e-5)
        rows, columns = x.shape[1:3]
        x = x.flatten(1, 2)
        if i == len(model.stages) - 1:
            x = torch.cat([state[f"stages.{i}.cls_token"].expand(len(x), 1, -1), x], 1)
        x = x + state[f"stages.{i}.pos_embed"]
        for j in range(len(stage.blocks)):
            name = f"stages.{i}.blocks.{j}"
            y = norm(x, f"{name}.norm1", 1e-6)
            reduced = (
                patches(y.unflatten(1, (rows, columns)), f"{name}.attn.norm", 1e-5).flatten(1, 2)
                if f"{name}.attn.sr.weight" in state
                else y
            )
            heads, width = i + 1, x.shape[-1]
            q = linear(y, f"{name}.attn.q").unflatten(2, (heads, -1)).transpose(1, 2)
            k, v = linear(reduced, f"{name}.attn.kv").unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
            maps = (q @ k.transpose(2, 3) * (width // heads) ** -0.5).softmax(-1)
            x = x + linear((maps @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
            hidden = torch.nn.functional.gelu(linear(norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1"))
            x = x + linear(hidden, f"{name}.mlp.fc2")
        x = x if i == len(model.stages) - 1 else x.unflatten(1, (rows, columns))
    return linear(norm(x, "norm", 1e-6)[:, 0], "head")


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_logits_are_the_papers(size: tuple[int, int]) -> None:
    model = tiny_pyramid("pvt1", size).double()
    inputs = images(size).double()
    torch.testing.assert_close(
        model(inputs), dense(model, inputs.permute(0, 2, 3, 1)), rtol=1e-10, atol=1e-10
    )


def test_the_maps_of_the_stages_are_timms_features() -> None:
    model: Any = tiny_pyramid("pvt1")
    tokens, maps = model.forward_intermediates(images(SIZE), norm=True)
    assert [tuple(each.shape) for each in maps] == [(2, 8, 8, 8), (2, 16, 4, 4)]
    assert torch.equal(maps[1].flatten(2).transpose(1, 2), tokens[:, 1:])
    assert torch.equal(model.forward_head(tokens), model(images(SIZE)))
    [first] = model.forward_intermediates(images(SIZE), [0], stop_early=True, intermediates_only=True)
    assert torch.equal(first, maps[0])
    features = timm.create_model("pvt_tiny", features_only=True, img_size=64, out_indices=(1, 3))
    assert [tuple(each.shape) for each in features(torch.zeros(1, 3, 64, 64))] == [
        (1, 128, 8, 8),
        (1, 512, 2, 2),
    ]
    assert features.feature_info.channels() == [128, 512]


def test_positions_are_resampled_for_another_size_in_a_call_or_for_good() -> None:
    model: Any = tiny_pyramid("pvt1")
    inputs = images((40, 48))
    passing = model(inputs)
    model.set_input_size((40, 48))
    assert model.stages[1].pos_embed.shape == (1, 1 + 5 * 6, 16)
    assert torch.equal(model(inputs), passing)


def test_a_mean_instead_of_a_class_token() -> None:
    model: Any = tiny_pyramid("pvt1", global_pool="avg", sr_ratios=(2, 2))
    assert model.num_prefix_tokens == 0
    features = model.forward_features(images(SIZE))
    assert torch.equal(model(images(SIZE)), model.head(features.mean(1)))
    assert not model.no_weight_decay()
    assert tiny_pyramid("pvt1").no_weight_decay() == {"stages.1.cls_token"}  # type: ignore[operator]


def test_attention_of_a_stage_with_a_class_token_counts_it() -> None:
    tokens, pairs = 4 * 4 + 1, 8 * 8 * 4 * 4
    assert attention_macs(tiny_pyramid("pvt1")) == [2 * pairs * 8, 2 * tokens**2 * 16, 2 * tokens**2 * 16]


def test_layer_groups_follow_the_depth() -> None:
    model: Any = tiny_pyramid("pvt1")
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["patch_embed.proj.weight"] == 0
    assert groups["stages.0.blocks.0.norm1.weight"] < groups["stages.1.pos_embed"]
    assert groups["stages.1.pos_embed"] == groups["stages.1.blocks.0.norm1.weight"]
    assert groups["norm.weight"] < groups["head.weight"]


@pytest.mark.parametrize(("options", "words"), [
    ({"sr_ratios": (2, 2)}, r"sr_ratios=\(2, 2\): the last stage has a class token"),
    ({"mlp_ratios": (2, 2, 2)}, "mlp_ratios has values for 3 stages, and depths for 2"),
    ({"global_pool": "max"}, "global_pool='max'; valid are token and avg"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_pyramid("pvt1", **options)


def test_what_a_built_model_cannot_do_is_refused() -> None:
    model: Any = tiny_pyramid("pvt1")
    with pytest.raises(ConfigError, match="global_pool='avg'; this model was built with token"):
        model.reset_classifier(3, "avg")
    with pytest.raises(ConfigError, match="output_fmt='NLC'; valid is NCHW"):
        model.forward_intermediates(images(SIZE), output_fmt="NLC")


# Small models, and models without memory.


@pytest.mark.parametrize("name", SMALL)
def test_small_models_have_the_sizes_of_their_table(name: str) -> None:
    *numbers, parameters, macs = SMALL[name]
    image, patch, tokens, width, depth, heads = map(int, numbers)
    model = timm.create_model(name).eval()
    assert model.default_cfg["input_size"] == (3, image, image)
    assert model.patch_embed.patch_size == (patch, patch)
    assert model.pos_embed.shape == (1, tokens, width)
    shape = attention_shape(model)
    assert (shape.depth, shape.num_heads, shape.head_dim) == (depth, heads, 64)
    assert f"{parameters_of(model) / 1e6:.2f} M" == parameters
    for block in model.blocks:
        block.attn.fused_attn = False  # the counter does not know every fused kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(torch.zeros(1, 3, image, image)).shape == (1, 10)
    assert f"{counter.get_total_flops() / 2e9:.2f} G" == macs


def test_arguments_go_to_timm_and_the_model_can_be_converted() -> None:
    model = timm.create_model("vit_cifar_nano", num_classes=3, img_size=(16, 24), depth=2)
    assert convert(model, "*: linear")(torch.zeros(1, 3, 16, 24)).shape == (1, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_memory_is_missing(family: str) -> None:
    name, options = FAMILIES[family]
    whole = timm.create_model(name, **{**PLAIN, **options}).state_dict()
    with without_memory():
        outlined = timm.create_model(name, **{**PLAIN, **options}).state_dict()
        assert torch.empty(2).is_meta
    described = {key: (tensor.shape, tensor.dtype) for key, tensor in outlined.items()}
    assert described == {key: (tensor.shape, tensor.dtype) for key, tensor in whole.items()}
    assert all(tensor.is_meta for tensor in outlined.values())


def test_a_tensor_with_memory_is_filled_and_a_shape_that_does_not_fit_is_refused() -> None:
    with without_memory():
        assert torch.zeros(2, device="cpu").fill_(3.0).tolist() == [3.0, 3.0]
        with pytest.raises(RuntimeError, match="shape"):
            torch.empty(2, 3).add_(torch.empty(4))
