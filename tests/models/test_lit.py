"""LIT is what its authors published: parameters, multiply-adds, logits and offsets; and a model of timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.formats.lit_keys import from_reference, to_reference
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.models import lit
from graftvit.models.conversion import convert, plan_of, resize
from graftvit.models.cost import attention_macs, other_macs
from graftvit.models.families import is_pyramid, sites
from graftvit.models.merges import merge_layers
from graftvit.models.small import without_memory
from support.models.golden import golden_images, golden_state
from support.models.pyramids import images
from torch import nn

ROWS = [
    [cell.strip() for cell in line.strip("| ").split("|")]
    for line in (lit.__doc__ or "").splitlines()
    if line.startswith(("| lit_", "| litv2_"))
]
TINY: dict[str, dict[str, Any]] = {
    "lit_ti": {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)},
    "lit_s": {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
    "litv2_s": {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
}


def tiny_lit(name: str, **more: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(name, **{**TINY[name], "num_classes": 3, "img_size": 64, **more}).eval()


def outlined(name: str) -> nn.Module:
    with without_memory():
        return timm.create_model(name)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_parameters_to_the_integer(row: list[str]) -> None:
    name, _, parameters, drop_path = row
    model: Any = outlined(name)
    assert f"{sum(p.numel() for p in model.parameters()):,}" == parameters
    last = sites(model)[-1].block(model)
    assert last.drop_path2.drop_prob == pytest.approx(float(drop_path))  # type: ignore[union-attr]
    assert model.default_cfg["input_size"] == (3, 224, 224)


def test_every_model_is_in_the_table() -> None:
    assert [row[0] for row in ROWS] == list(lit.default_cfgs)


PUBLISHED = {"lit_s": 4_081_669_692, "lit_m": 8_599_300_000, "lit_b": 15_036_700_000}


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


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items(), ids=PUBLISHED)
def test_multiply_adds_are_the_published_ones(name: str, published: int) -> None:
    model = outlined(name)
    ours = sum(attention_macs(model)) + other_macs(model)
    assert ours + swin_extras(model, 12) == pytest.approx(published, rel=1e-5)
    if name == "lit_s":
        assert ours + swin_extras(model, 12) == published
        assert ours + swin_extras(model, 8) == 4_079_558_184


SECOND = {"litv2_s": 3.734e9, "litv2_m": 7.479e9, "litv2_b": 13.194e9}


@pytest.mark.parametrize(("name", "published"), SECOND.items(), ids=SECOND)
def test_multiply_adds_of_litv2_without_what_it_projects_before_pooling(name: str, published: float) -> None:
    """The authors project the pooled tokens. We project all tokens, then pool: 3/4 of these products are more."""
    model = outlined(name)
    more, biases = 0, 0
    for site in sites(model):
        tokens = site.shape.geometry.num_tokens
        biases += 4 * site.width * tokens  # of the depthwise convolutions
        if site.stage == 2:
            low = int(0.9 * site.num_heads) * site.head_dim
            more += 2 * low * site.width * tokens * 3 // 4
    found = sum(attention_macs(model)) + other_macs(model) - more + swin_extras(model, 12) + biases
    assert found == pytest.approx(published, rel=3e-4)


def test_multiply_adds_of_lit_ti() -> None:
    model = outlined("lit_ti")
    assert sum(attention_macs(model)) == 155_197_440
    found = sites(model)
    norms = sum((1 + (site.stage > 1)) * 2 * site.width * site.shape.geometry.num_tokens for site in found)
    ends = 2 * (3136 * 64 + 50 * 512)
    merges = sum(tokens * (width + 8 + 2 * width) for tokens, width in ((784, 128), (196, 320), (49, 512)))
    assert sum(attention_macs(model)) + other_macs(model) + norms + ends + 3136 * 64 + merges == 3_618_788_648


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


@pytest.mark.parametrize("name", TINY)
def test_a_lit_is_a_model_of_timm(name: str) -> None:
    model, inputs = tiny_lit(name), images((64, 64))
    assert is_pyramid(model)
    assert str(plan_of(model)).endswith("; merge: deformable")
    tokens, maps = model.forward_intermediates(inputs)
    assert torch.equal(model.forward_head(tokens), model(inputs))
    assert [tuple(each.shape[2:]) for each in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    features = timm.create_model(name, features_only=True, img_size=64, out_indices=(1, 3), **TINY[name])
    assert [tuple(each.shape[2:]) for each in features(inputs)] == [(8, 8), (2, 2)]
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()
    undecayed = {
        key for key, _ in model.named_parameters() if any(word in key for word in model.no_weight_decay())
    }
    expected = {"lit_ti": {"cls_token"}, "lit_s": {"relative_position_bias_table"}, "litv2_s": set()}
    assert {key.rpartition(".")[2] for key in undecayed} == expected[name]


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny_lit(name, drop_path_rate=0.0).train()
        model.set_grad_checkpointing(checkpointed)
        model(images((64, 64))).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [(96, 64), (72, 104)])
def test_any_size_of_images(name: str, size: tuple[int, int]) -> None:
    """72 x 104 has 18 x 26, 9 x 13, 4 x 6 and 2 x 3 tokens."""
    model = tiny_lit(name)
    resize(model, size)
    assert model(images(size)).shape == (2, 3)
    assert tiny_lit(name, img_size=size)(images(size)).shape == (2, 3)
    sided = [site.shape.geometry.grid for site in sites(model) if site.place == 0]
    assert sided == [tuple(side // step for side in size) for step in (4, 8, 16, 32)]


@pytest.mark.parametrize("name", ["lit_ti", "lit_s"])
def test_softmax_of_a_lit_can_become_another_operator(name: str) -> None:
    model, inputs = tiny_lit(name), images((64, 64))
    student = convert(model, "stage3: linear", without=["bias"])
    again = timm.create_model(
        "graftvit_converted", architecture=name, plan=plan_of(student), without=["bias"],
        **TINY[name], num_classes=3, img_size=64,
    ).eval()  # fmt: skip
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(inputs), student(inputs))
    assert plan_of(again) == plan_of(student)
    assert torch.equal(convert(model, "stage3: keep")(inputs), model(inputs))


@pytest.mark.parametrize("name", TINY)
def test_a_saved_lit_is_loaded_at_any_size(tmp_path: Path, name: str) -> None:
    model, inputs = tiny_lit(name), images((64, 64))
    arguments = {**TINY[name], "num_classes": 3, "img_size": 64}
    shown = Preprocessing.of(model, input_size=(3, 64, 64), mean=(0.4,) * 3, std=(0.2,) * 3)
    write_student(model, tmp_path / "lit", architecture=name, model_args=arguments, preprocessing=shown)
    with torch.no_grad():
        loaded = graftvit.load(str(tmp_path / "lit"))
        torch.testing.assert_close(loaded(inputs), model.requires_grad_(False)(inputs))
        larger = graftvit.load(str(tmp_path / "lit"), img_size=(64, 96))
        resize(model, (64, 96))
        torch.testing.assert_close(larger(images((64, 96))), model(images((64, 96))))
    assert plan_of(loaded) == plan_of(model)
