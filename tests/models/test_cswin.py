"""CSwin and AttnZero's CSwin have their published sizes, and compute their equations from files under their names."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.checkpoints.export import export_model
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.models import cswin_models
from graftvit.models.attention.base import Heads
from graftvit.models.attention.softmax import Softmax
from graftvit.models.conversion import convert, resize, with_own_plan
from graftvit.models.cost import attention_macs, other_macs
from graftvit.models.errors import CheckpointError, ConfigError
from graftvit.models.families import family_of
from graftvit.models.hosting import host_attention, release_attention
from graftvit.models.small import without_memory
from support.models.cswin_restated import (
    ATTNZERO,
    CSWIN,
    Published,
    State,
    feature_maps,
    logits,
    published_shapes,
    published_state,
    trial_105,
    trial_140,
)
from support.models.pyramids import images
from support.models.tiny_students import save_folder
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TINY = Published(8, (1, 1, 2, 1), (2, 2, 4, 8), (1, 2, 2, 2), 64, 5)
ARGUMENTS: dict[str, Any] = {
    "embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 8), "split_size": (1, 2, 2, 2),
}  # fmt: skip


def tiny(**more: Any) -> Any:
    return timm.create_model("cswin_tiny", **{**ARGUMENTS, "num_classes": 5, "img_size": 64, **more}).eval()


def table(module: Any, start: str) -> dict[str, list[str]]:
    """By name: the cells of the rows of a module's docstring."""
    rows = [line for line in module.__doc__.splitlines() if line.startswith(f"| {start}")]
    cells = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]
    return {row[0]: row[1:] for row in cells}


def multiply_adds(model: Any) -> int:
    return sum(attention_macs(model)) + other_macs(model)


def drawn(model: Any) -> Any:
    """Return the model with parameters that are not zero, so that a bias shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save(state: State, folder: Path, key: str = "") -> str:
    path = folder / "cswin.pth"
    torch.save({key: state, "epoch": 299, "args": Namespace(lr=1e-5)} if key else state, path)
    return str(path)


def check(given: Published, path: str, size: tuple[int, int], name: str, **more: Any) -> None:
    state = published_state(given)
    loaded = load_pretrained(save(state, Path(path)), model=name, **more)
    assert (loaded.report.missing, loaded.report.unexpected, loaded.report.loaded) == ({}, {}, len(state))
    inputs = images(size, 1).double()
    with torch.no_grad():
        expected = logits(given, state, inputs)
        assert expected.std() > 0.1
        torch.testing.assert_close(loaded.model.double()(inputs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (104, 136), (40, 24)])
def test_logits_are_those_of_the_published_equations(tmp_path: Path, size: tuple[int, int]) -> None:
    """At sizes that stripes do not divide, too: queries, keys and values are padded half on each side."""
    check(TINY, str(tmp_path), size, "cswin_tiny", model_args={**ARGUMENTS, "img_size": 64})


@pytest.mark.parametrize("size", [(104, 136), (64, 64)])
def test_maps_of_the_stages_are_those_of_the_published_equations(size: tuple[int, int]) -> None:
    state, model = published_state(TINY), timm.create_model("cswin_tiny", features_only=True, **ARGUMENTS)
    own = {key: state[key.replace(".attn.", ".")].double() for key in model.model.state_dict()}
    model.double().model.load_state_dict(own)
    inputs = images(size).double()
    with torch.no_grad():
        expected = feature_maps(TINY, {key: tensor.double() for key, tensor in state.items()}, inputs)
        torch.testing.assert_close(model(inputs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (104, 136)])
@pytest.mark.parametrize(
    ("name", "program"), [("attnzero_cswin_t", trial_105), ("attnzero_cswin_t_140", trial_140)]
)
def test_logits_of_attnzero_are_those_of_the_published_equations(
    tmp_path: Path, name: str, program: Any, size: tuple[int, int]
) -> None:
    given = replace(TINY, splits=(16, 8, 2, 2), letters="AABB", program=program)
    check(
        given,
        str(tmp_path),
        size,
        name,
        model_args={**ARGUMENTS, "split_size": (16, 8, 2, 2), "img_size": 64},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, (224, 224)) for name in [*CSWIN, *ATTNZERO]),
        *((name, size) for name in ("cswin_tiny", "attnzero_cswin_t") for size in ((384, 384), (224, 160))),
    ],
)
def test_models_of_the_published_widths_are_the_published_ones(
    tmp_path: Path, name: str, size: tuple[int, int]
) -> None:
    """The smallest models are whole; the others have fewer blocks."""
    given = {**CSWIN, **ATTNZERO}[name]
    if size[0] == 384:
        given = replace(given, splits=(96, 48, 12, 12) if name in ATTNZERO else (1, 2, 12, 12), image=384)
    if name not in ("cswin_tiny", "attnzero_cswin_t", "attnzero_cswin_t_140"):
        given = replace(given, depths=(1, 1, 2, 1))
    arguments = {"split_size": given.splits, "img_size": size[0], "depths": given.depths}
    check(given, str(tmp_path), size, name, model_args=arguments)


@pytest.mark.parametrize("key", ["", "state_dict", "state_dict_ema", "model"])
def test_a_file_names_its_size_by_its_tensors(tmp_path: Path, key: str) -> None:
    """A file of any container; no tensor tells the size of the images."""
    with without_memory():
        state = {name: torch.empty(shape) for name, shape in published_shapes(CSWIN["cswin_tiny"]).items()}
    state = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
    path = save(state, tmp_path, key) + ("#ema" if key.endswith("ema") else "")
    loaded = load_pretrained(path, img_size=384, model_args={"split_size": (1, 2, 12, 12)})
    assert (loaded.architecture, loaded.report.loaded) == ("cswin_tiny", 418)
    assert loaded.preprocessing.input_size == (3, 384, 384)


PUBLISHED = {
    "cswin_tiny": (22_320_552, 4_324_203_008), "cswin_small": (34_643_304, 6_800_714_752),
    "cswin_base": (77_382_184, 14_955_348_480), "cswin_large": (173_262_664, 33_130_144_512),
    **dict.fromkeys(("attnzero_cswin_t", "attnzero_cswin_t_140"), (20_393_320, 4_303_379_968)),
    **dict.fromkeys(("attnzero_cswin_s", "attnzero_cswin_s_140"), (32_716_072, 6_760_624_128)),
    **dict.fromkeys(("attnzero_cswin_b", "attnzero_cswin_b_140"), (73_053_640, 14_866_311_168)),
}  # fmt: skip
"""Parameters and multiply-adds at 224 x 224."""
LARGE = {
    "cswin_tiny": 13_991_948_288, "cswin_base": 46_963_660_800, "cswin_large": 101_881_930_752,
    "attnzero_cswin_b": 46_166_734_848, "attnzero_cswin_b_140": 46_166_734_848,
}  # fmt: skip
"""Multiply-adds at 384 x 384."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_parameters_and_multiply_adds_are_the_published_ones(name: str) -> None:
    with without_memory():
        model = timm.create_model(name)
    own = {key.replace(".attn.", "."): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert own == published_shapes({**CSWIN, **ATTNZERO}[name])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (parameters, multiply_adds(model)) == PUBLISHED[name]
    if name in CSWIN:
        assert [f"{each:,}" for each in PUBLISHED[name]] == table(cswin_models, "cswin_")[name][2:4]


@pytest.mark.parametrize("name", LARGE)
def test_multiply_adds_at_384(name: str) -> None:
    split = (0, 0, 12, 12) if "attnzero" in name else (1, 2, 12, 12)
    with without_memory():
        model = timm.create_model(name, img_size=384, split_size=split)
    assert multiply_adds(model) == LARGE[name]
    assert "attnzero" in name or f"{LARGE[name]:,}" == table(cswin_models, "cswin_")[name][4]


def test_a_file_of_attnzero_does_not_say_its_program(tmp_path: Path) -> None:
    state = {
        name: torch.zeros(shape) for name, shape in published_shapes(ATTNZERO["attnzero_cswin_t"]).items()
    }
    with pytest.raises(CheckpointError, match="attnzero_cswin_t"):
        load_pretrained(save(state, tmp_path))
    assert load_pretrained(str(tmp_path / "cswin.pth"), model="attnzero_cswin_t_140").report.loaded == 406


def test_an_image_size_changes_no_tensor() -> None:
    model = tiny()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.set_input_size((96, 64))
    assert model.patch_embed.img_size == (96, 64)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("more", [
    {"num_heads": (2, 2, 3, 8)}, {"num_heads": (1, 2, 4, 8)}, {"depths": (1, 1)}, {"global_pool": "token"},
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        tiny(**more)


def test_it_is_a_model_of_timm() -> None:
    model, inputs = tiny(drop_path_rate=0.1), images((64, 64))
    tokens, maps = model.forward_intermediates(inputs)
    assert torch.equal(model.forward_head(tokens), model(inputs))
    assert [tuple(each.shape[1:]) for each in maps] == [(8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert model.no_weight_decay() == set()
    model.reset_classifier(3)
    assert model(inputs).shape == (2, 3)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert model(inputs).shape == (2, 16)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = tiny().train()
        model.set_grad_checkpointing(checkpointed)
        model(images((64, 64))).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    torch.testing.assert_close(*gradients)


# CSwin as a family: its hosts compute what the layers do, and a conversion keeps LePE, of the whole map.

SIZES = [(64, 64), (104, 136), (40, 24)]
"""With stripes of 2, grids of the last two have padding."""


class Observing:
    """A softmax that is not the host's own, as a method puts it in its place."""

    needs = ("q", "k", "v")

    def __call__(self, heads: Heads) -> Tensor:
        return Softmax()(heads)


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_host_computes_what_the_layer_does(size: tuple[int, int], observed: bool) -> None:
    """Also by softmax over all pairs with a bias, where padding is one more key."""
    model, inputs = drawn(tiny()).double(), images(size).double()
    expected = model(inputs)
    for host in host_attention(model).values():
        host.operator = Observing() if observed else host.operator
    torch.testing.assert_close(model(inputs), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(release_attention(model)(inputs), expected)


def test_softmax_within_stripes_is_a_part_of_softmax() -> None:
    """A converted layer with the operator `stripes` differs from the native one in LePE at borders of stripes alone."""
    model, inputs = drawn(tiny()).double(), images((64, 64)).double()
    student = convert(model, "stage3: stripes(width=2, local_size=0)")
    for each in (model, student):
        for block in each.stage3:
            for lepe in block.attn.attns:
                lepe.get_v.weight.data[:, :, [0, 0, 2, 2], [0, 2, 0, 2]] = 0
                lepe.get_v.weight.data[:, :, [0, 1, 1, 2], [1, 0, 2, 1]] = 0  # the token itself
    torch.testing.assert_close(student(inputs), model(inputs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_a_converted_layer_is_the_operator_and_lepe_of_the_whole_map(size: tuple[int, int]) -> None:
    student = convert(drawn(tiny()), "*: softmax").double()
    layer, grid = student.stage2[0].attn, ((size[0] + 7) // 8, (size[1] + 7) // 8)
    x_BNC = torch.randn(2, grid[0] * grid[1], 16, dtype=torch.float64)
    v = layer.qkv(x_BNC).chunk(3, -1)[2].transpose(1, 2).unflatten(2, grid)
    weight = torch.cat([lepe.get_v.weight for lepe in layer.attns])
    bias = torch.cat([lepe.get_v.bias for lepe in layer.attns])
    q, k, values = layer.qkv(x_BNC).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    out = (q @ k.transpose(2, 3) * 8**-0.5).softmax(-1) @ values
    local = F.conv2d(v, weight, bias, padding=1, groups=16).flatten(2).transpose(1, 2)
    expected = layer.proj(out.transpose(1, 2).flatten(2) + local)
    torch.testing.assert_close(layer(x_BNC, grid), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [(64, 64), (104, 136), (40, 24), (36, 52)])
@pytest.mark.parametrize("plan", [None, "*: linear", "stage2: none; stage3: stripes(width=2)"])
def test_products_are_those_of_torchs_counter(size: tuple[int, int], plan: str | None) -> None:
    model = tiny(img_size=64)
    model = model if plan is None else convert(model, plan)
    resize(model, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images(size, 1))
    assert multiply_adds(model) == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "plan", ["*: linear", "stage1-2: attnzero_140(local_size=0); stage3: stripes(width=2)"]
)
def test_a_converted_model_is_saved_loaded_resized_and_exported(tmp_path: Path, plan: str) -> None:
    student = convert(drawn(tiny()), plan).eval()
    name, arguments = with_own_plan(student, "cswin_tiny", {**ARGUMENTS, "num_classes": 5, "img_size": 64})
    folder, inputs = save_folder(student, tmp_path / "student", name, arguments), images((64, 64))
    loaded = graftvit.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs), student(inputs))
        larger = graftvit.load(folder, img_size=(96, 64))
        resize(student, (96, 64))
        torch.testing.assert_close(larger(images((96, 64))), student(images((96, 64))))
    if "stripes" in plan:  # tests/launch/test_pyramid_table.py exports linear layers
        assert export_model(loaded, tmp_path / "student.pt2").checked


def test_a_resized_model_keeps_its_branches() -> None:
    """A stage of the whole map has one branch, also where the new size would give it two."""
    model = tiny(split_size=(16, 2, 2, 2))
    resize(model, 96)
    assert family_of(model).size_arguments(model) == {"img_size": (96, 96), "split_size": [0, 2, 2, 0]}
    again = tiny(**family_of(model).size_arguments(model))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(images((96, 96))), model(images((96, 96))))
