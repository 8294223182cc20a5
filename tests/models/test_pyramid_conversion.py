"""Conversion of pyramids: what runs, what is dropped, what is saved, and what is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from graftvit.models.attention.base import AttentionOperator, Geometry, Heads, Traits
from graftvit.models.conversion import convert, converted_layers, plan_of, plan_size, resize
from graftvit.models.errors import ConfigError, GraftError, UnsupportedModelError
from graftvit.models.families import check_supported, image_size, sites
from graftvit.models.grid_hosts import host_layers
from graftvit.models.layer_plan import OPERATORS
from graftvit.models.small import without_memory
from support.models.pyramids import TINY, arguments, images, tiny
from torch import Tensor, nn

SIZE = (32, 32)
BIASED = ("swin", "swinv2")
PROJECTIONS = ("q.weight", "kv.weight", "qkv.weight")


def converted(kind: str, plan: str = "*: linear", **more: Any) -> nn.Module:
    return convert(tiny(kind), plan, without=["bias"], **more).eval()


def rebuilt(student: nn.Module, kind: str, size: tuple[int, int] = SIZE, **more: Any) -> nn.Module:
    """Return the model that timm builds from a converted model's settings, with its weights."""
    again = timm.create_model(
        "graftvit_converted", architecture=TINY[kind][0], plan=plan_of(student), without=["bias"],
        **arguments(kind, size, img_size=size, **more),
    )  # fmt: skip
    again.load_state_dict(student.state_dict())
    return again.eval()


@pytest.mark.parametrize("operator", ["linear", "attnzero_105", "attnzero_174"])
@pytest.mark.parametrize("kind", TINY)
def test_an_operator_trains_saves_loads_and_resizes(kind: str, operator: str) -> None:
    student, inputs = converted(kind, f"*: {operator}"), images(SIZE)
    student.train()(inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters()), "no parameter is idle"
    torch.optim.SGD(student.parameters(), 0.01).step()
    student.eval()
    again = rebuilt(student, kind)
    assert plan_of(again) == plan_of(student) == f"*: {operator}"
    assert torch.equal(again(inputs), student(inputs))
    torch.testing.assert_close(copy.deepcopy(student)(inputs), student(inputs))
    resize(student, (40, 48))
    assert image_size(student) == (40, 48)
    assert torch.equal(
        rebuilt(student, kind, (40, 48), plan_size=SIZE)(images((40, 48))), student(images((40, 48)))
    )


@pytest.mark.parametrize("kind", TINY)
def test_a_converted_layer_is_its_equation_on_the_whole_grid(kind: str) -> None:
    model = tiny(kind).double()
    student = convert(model, "*: softmax", without=["bias"]).double()
    site = sites(student)[1]
    layer: Any = site.block(student).attn
    tokens = torch.randn(2, site.shape.geometry.num_tokens, site.width).double()
    heads = layer.project(tokens.unflatten(1, site.shape.geometry.grid), None) if kind in BIASED else layer.project(
        tokens, site.shape.geometry.grid
    )  # fmt: skip
    q, k, v = heads.qkv()
    logits = heads.scale * q @ k.transpose(2, 3) + (0 if heads.bias is None else heads.bias)
    dense = layer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    out = layer.merge(layer.attend(heads), tokens)
    torch.testing.assert_close(out, dense)
    original: Any = sites(model)[1].block(model).attn
    weight = (
        torch.cat([original.q.weight, original.kv.weight]) if hasattr(original, "kv") else original.qkv.weight
    )
    assert torch.equal(
        torch.cat([p for n, p in layer.named_parameters() if n in ("q.weight", "kv.weight", "qkv.weight")]),
        weight,
    )


@pytest.mark.parametrize("kind", ["pvt", "pvt1", "pcpvt", "swin", "swinv2"])
def test_softmax_over_a_grid_of_one_window_is_what_windows_are(kind: str) -> None:
    """One window as large as the grid is the whole grid, with its bias; so is a reduction of nothing."""
    one = {"sr_ratios": (1, 1)} if kind in ("pvt", "pvt1", "pcpvt") else {"window_size": 8}
    model = tiny(kind, **one).double()
    student = convert(model, "*: softmax")
    torch.testing.assert_close(
        student(images(SIZE).double()), model(images(SIZE).double()), rtol=1e-10, atol=1e-11
    )
    assert plan_of(student) == "*: softmax"


@pytest.mark.parametrize("kind", TINY)
def test_keep_is_the_layer_as_it_is(kind: str) -> None:
    model, inputs = tiny(kind), images(SIZE)
    same = convert(model, "*: keep")
    assert plan_of(same) is None
    assert torch.equal(same(inputs), model(inputs))
    hosts = copy.deepcopy(model)
    host_layers(hosts)
    assert torch.equal(convert(hosts, "*: keep")(inputs), model(inputs)), "hosts do not stay"


@pytest.mark.parametrize("kind", TINY)
def test_none_takes_attention_and_norm_out(kind: str) -> None:
    model, inputs = tiny(kind), images(SIZE)
    student = convert(model, "stage1: none")
    gone = {site.path for site in sites(model) if site.stage == 0}
    expected = {
        key
        for key in model.state_dict()
        if not any(key.startswith((f"{p}.attn.", f"{p}.norm1.")) for p in gone)
    }
    assert student.state_dict().keys() == expected
    assert plan_of(student) == {
        "pvt": "0: none; 1-2: keep",
        "pvt_li": "0: none; 1-2: keep",
        "pvt1": "0: none; 1-2: keep",
    }.get(kind, "0-1: none; 2-3: keep")
    assert torch.equal(rebuilt(student, kind)(inputs), student(inputs))
    student.train()(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    with torch.no_grad():  # the same model, with an attention that gives zeros
        for site in sites(model):
            if site.stage == 0:
                block: Any = site.block(model)
                last = block.norm1 if kind == "swinv2" else block.attn.proj
                last.weight.zero_()
                last.bias.zero_()
    torch.testing.assert_close(student.eval()(inputs), model(inputs))


class QueriesAndValues(AttentionOperator):
    """An operator that needs no keys, as hashing has none."""

    needs = ("q", "v")

    @property
    def traits(self) -> Traits:
        return Traits()

    def attend(self, heads: Heads) -> Tensor:
        assert heads.q is not None
        return heads.q * heads.values().mean(2, keepdim=True)

    def macs(self, geometry: Geometry) -> int:
        return 0


@pytest.mark.parametrize("kind", TINY)
def test_rows_that_an_operator_does_not_need_are_dropped(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "qv", QueriesAndValues)
    model = tiny(kind)
    for plan, parts in (("*: qv", 2), ("*: uniform", 1)):
        student = converted(kind, plan)
        for site in sites(student):
            layer: Any = site.block(student).attn
            rows = sum(
                p.shape[0]
                for n, p in layer.named_parameters()
                if n in ("q.weight", "kv.weight", "qkv.weight")
            )
            assert rows == parts * site.width
        student(images(SIZE)).sum().backward()
        assert all(parameter.grad is not None for parameter in student.parameters())
        assert torch.equal(rebuilt(student, kind)(images(SIZE)), student(images(SIZE)))
    layer, original = sites(student)[0].block(student).attn, sites(model)[0].block(model).attn
    values = original._modules.get("kv") or original._modules["qkv"]
    found = layer._modules.get("kv") or layer._modules["qkv"]
    assert torch.equal(found.weight, values.weight[-8:]), "what stays are the values"  # type: ignore[union-attr, index]


PUBLISHED = {
    "pvt_v2_b0": 3_136_328,
    "pvt_v2_b1": 11_891_368,
    "pvt_v2_b2": 20_367_528,
    "pvt_v2_b3": 34_084_008,
    "pvt_v2_b4": 45_665_704,
    "twins_svt_small": 21_522_088,
}
"""Parameters of the models of EcoFormer (arXiv:2209.09004): stages 1 to 3 with rows of queries and values alone."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "qv", QueriesAndValues)
    with without_memory():
        model = timm.create_model(
            "graftvit_converted", architecture=name, plan="stage1: qv; stage2: qv; stage3: qv", img_size=224
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("kind", BIASED)
def test_a_relative_position_bias_is_given_up_only_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match="layer 0 has a relative position bias, which linear"):
        convert(tiny(kind), "*: linear")
    mixed = convert(tiny(kind), "stage1: linear; stage2: softmax", without=["bias"])
    names = [
        name
        for name, _ in mixed.named_parameters()
        if "relative_position_bias_table" in name or "cpb_mlp" in name
    ]
    assert names
    assert all(name.startswith("layers.1.") for name in names)
    with pytest.raises(ConfigError, match="without='bios'; did you mean 'bias'"):
        convert(tiny(kind), "*: softmax", without=["bios"])


@pytest.mark.parametrize("kind", BIASED)
def test_a_bias_of_the_whole_grid_is_resized_with_the_images(kind: str) -> None:
    student = convert(tiny(kind), "*: softmax")
    resize(student, (40, 24))
    assert student(images((40, 24))).shape == (2, 3)
    again = rebuilt(student, kind, (40, 24), plan_size=SIZE)
    assert torch.equal(again(images((40, 24))), student(images((40, 24))))


@pytest.mark.parametrize("kind", ["pvt", "pvt1", "svt", "swin", "swinv2"])
def test_a_saved_student_cannot_become_what_it_has_lost(kind: str) -> None:
    student = rebuilt(converted(kind, "0: linear; 1: none"), kind)
    for plan, words in (
        ("0: softmax", "layer 0 was converted to linear and has lost"),
        ("1: linear", "lost its attention"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            convert(student, plan)
    again = convert(student, "2: linear", without=["bias"])
    assert str(plan_of(again)).startswith("0: linear; 1: none; 2: linear")
    assert str(plan_of(convert(student, "0: none"))).startswith("0-1: none")
    with pytest.raises(UnsupportedModelError, match="weights=mlp needs a model that is not converted yet"):
        convert(student, "2: linear", weights="mlp", without=["bias"])


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("weights", ["mlp", "none"])
def test_fresh_weights(kind: str, weights: str) -> None:
    model, student = tiny(kind), converted(kind, "0: linear", weights=weights)
    own = dict(model.named_parameters())
    changed = {
        name for name, p in student.named_parameters() if name in own and not torch.equal(p, own[name])
    }
    within = {name for name in changed if name.startswith(f"{sites(model)[0].path}.attn.")}
    assert within
    assert (changed == within) == (weights == "mlp")


@pytest.mark.parametrize("kind", TINY)
def test_calibration_fits_each_layer_to_timms_on_its_own_inputs(kind: str) -> None:
    student = converted(kind, "*: hedgehog", calibration=images(SIZE, 4))
    errors = [layer.calibration for layer in converted_layers(student).values()]
    assert all(error is not None and error[1] <= error[0] for error in errors)
    assert any(error is not None and error[1] < error[0] for error in errors)


def test_layers_share_only_within_a_stage() -> None:
    student = converted("svt", "*: linformer(sharing=layerwise)")
    layers: Any = converted_layers(student)
    assert [len(list(layer.operator.parameters())) > 0 for layer in layers.values()] == [True, False] * 2
    assert student(images(SIZE)).shape == (2, 3)


def test_what_cannot_be_converted_is_named() -> None:
    with pytest.raises(ConfigError, match="there is no stage 3; the model has stages 1 to 2"):
        convert(tiny("pvt"), "stage3: linear")
    with pytest.raises(ConfigError, match="none has no option 'x'"):
        convert(tiny("pvt"), "0: none(x=1)")
    with pytest.raises(UnsupportedModelError, match=r"layer 0 has attn_drop 0\.1, and linear has no map"):
        convert(tiny("pvt", attn_drop_rate=0.1), "*: linear")
    plain = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    with pytest.raises(ConfigError, match="plan: 'none' takes the attention out of a layer of a pyramid"):
        convert(plain, "0: none")
    with pytest.raises(ConfigError, match="without=bias is for pyramids, and VisionTransformer is a plain"):
        convert(plain, "0: linear", without=["bias"])
    with pytest.raises(UnsupportedModelError, match="images of 4x4 leave no token in stage 2"):
        resize(tiny("svt"), 4)


@pytest.mark.parametrize("kind", ["pvt", "pvt1", "svt", "swin", "swinv2"])
def test_a_converted_pyramid_is_known_as_one(kind: str) -> None:
    student = converted(kind, "1: linear")
    check_supported(student, pyramids=True)
    with pytest.raises(GraftError, match="is a pyramid"):
        check_supported(student)
    assert plan_size(student) is None
    assert list(converted_layers(student)) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pvt", "pvt1", "svt", "swin", "swinv2"])
def test_a_converted_pyramid_exports(kind: str) -> None:
    student, inputs = converted(kind), images(SIZE)
    graph = torch.export.export(student, (inputs,), strict=False)
    torch.testing.assert_close(graph.module()(inputs), student(inputs))


@pytest.mark.parametrize("kind", ["pvt", "pvt1", "swin", "swinv2"])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        student: Any = convert(tiny(kind, drop_path_rate=0.0), "*: linear", without=["bias"]).train()
        student.set_grad_checkpointing(checkpointed)
        student(images(SIZE)).square().sum().backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    torch.testing.assert_close(*gradients)
