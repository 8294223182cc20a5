"""Loss, logits and gradients of every method against the dense reference: families, unequal models, large logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.copying.teacher_view import Normalization
from graftvit.models.errors import TransferError
from graftvit.transfer.methods.dual import DualViT
from graftvit.transfer.methods.method_facts import method_names
from graftvit.transfer.methods.registry import find_method
from support.models.dense import FAMILIES, gradient, images, relative_error, tiny
from support.models.method_cases import COPIES, METHODS, only_read
from support.models.pair_reference import Pair, check_step
from torch import Tensor, nn

CORE = ("vit", "beit", "eva02")
"""Families with no bias of positions, a bias and a rotation: every method is compared there without `slow`."""
PAIRS = [
    pytest.param(
        method, family, marks=[] if family in CORE or method in ("copy", "distill") else pytest.mark.slow
    )
    for method in METHODS
    for family in FAMILIES
]
HALF = Normalization((0.5,) * 3, (0.5,) * 3)
SAME = {"teacher_normalization": HALF, "student_normalization": HALF}
EACH = {head: [head] for head in range(4)}


def pair_of(
    method: str, groups: dict[int, list[int]] | None = None, layers: Any = None, **options: Any
) -> Pair:
    """A pair of three layers and four heads, which go together one by one unless told otherwise."""
    if groups is None:
        groups = {} if find_method(method).joins_heads else EACH
    matched = layers or [(layer, layer) for layer in range(3)]
    options |= {"layers": layers} if layers else {}
    options = only_read(method, weight=1.0) | options
    return Pair(method, tuple(matched) if find_method(method).uses_layers else (), groups, options)


def compare(
    pair: Pair,
    teacher: nn.Module,
    student: nn.Module,
    x: Tensor,
    dtype: torch.dtype = torch.float64,
    near: float = 1e-9,
) -> None:
    theirs, ours = copy.deepcopy(teacher).to(dtype), copy.deepcopy(student).to(dtype)
    dual = DualViT(theirs, ours, pair.method, **SAME, **pair.options).to(dtype)
    check_step(pair, teacher, dual, copy.deepcopy(student), x, near, near)


def test_every_method_has_a_case() -> None:
    assert list(method_names()) == METHODS


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_method_equals_dense_reference(method: str, family: str) -> None:
    teacher, student, x = tiny(family, seed=1), tiny(family, seed=2), images(batch=1)
    for dtype, near in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        compare(pair_of(method), teacher, student, x, dtype, near)


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("family", ["vit", "vit_no_prefix", "dinov2_registers", "beit", "beit_shared"])
def test_distill_with_temperature(loss: str, temperature: float, family: str) -> None:
    pair = pair_of("distill", loss=loss, temperature=temperature)
    compare(pair, tiny(family, seed=1), tiny(family, seed=2), images())


MEANS = {head: [2 * head, 2 * head + 1] for head in range(4)}
TWO = {0: [0], 3: [3]}
HALVES = {head: [head // 2] for head in range(4)}
REGISTERS, NO_PREFIX, DISTILLED = (
    {"family": each} for each in ("dinov2_registers", "vit_no_prefix", "deit_distilled")
)
UNEQUAL: dict[str, tuple[Pair, dict[str, Any], dict[str, Any]]] = {
    "layers by pair": (pair_of("distill", layers=[(3, 0), (1, 2)]), {"depth": 4}, {}),
    **{
        f"{method}, heads {heads} of {count}": (pair_of(method, groups, heads=heads), {"num_heads": count}, {})
        for method in ("distill", "copy")
        for heads, count, groups in (
            ("mean", 8, MEANS), ("mean", 2, HALVES), ("0>1,5>1,2>3", 8, {1: [0, 5], 3: [2]}), ([0, 3], 4, TWO),
        )
    },
    **{f"some heads of {method}": (pair_of(method, TWO, heads=[0, 3]), {}, {}) for method in COPIES[1:]},
    "registers": (pair_of("distill"), REGISTERS, {}),
    **{f"{method} without a prefix": (pair_of(method), {}, NO_PREFIX) for method in ("distill", "copy")},
    **{f"{method} beside a distillation token": (pair_of(method), {}, DISTILLED) for method in ("distill", "copy")},
    "another grid": (pair_of("distill", interpolate_grid=True), {"img_size": (64, 32)}, {}),
    **{
        f"{method}, a teacher of width {width}": (pair_of(method), {"embed_dim": width}, {})
        for method, width in (
            ("copy", 16),
            *((each, 48) for each in ("distill", "copy", "distill_q", "attention_output", "block_output", "feature")),
        )
    },
    **{
        f"chosen heads of {method}": (
            pair_of(method, {0: [7], 2: [1]}, heads="7>0,1>2"), {"embed_dim": 64, "num_heads": 8}, {},
        )
        for method in ("distill_q", "attention_output")
    },
}  # fmt: skip


@pytest.mark.parametrize("case", UNEQUAL)
def test_unequal_models_equal_the_dense_reference(case: str) -> None:
    pair, theirs, ours = UNEQUAL[case]
    compare(pair, tiny(seed=1, **theirs), tiny(seed=2, **ours), images())


def mixed(seed: int) -> nn.Module:
    """A model whose layers have 3, 4 and 3 heads, with softmax."""
    shape = {"embed_dim": 24, "num_heads": (3, 4, 3), "mlp_ratio": (2, 3, 2), "patch_size": 8}
    torch.manual_seed(seed)
    model = timm.create_model("attnzero_autoformer_t", num_classes=5, img_size=(32, 48), **shape)
    return convert(model, "*: softmax").double().eval()


@pytest.mark.parametrize("method", ["copy", "distill"])
def test_layers_of_one_model_may_have_different_heads(method: str) -> None:
    compare(pair_of(method, layers=[(1, 1)]), mixed(1), mixed(2), images())
    dual = DualViT(mixed(1), mixed(2), method)
    assert [len(link.heads.groups) for link in dual.plan.links] == [3, 4, 3]


def test_grids_are_interpolated_only_when_asked() -> None:
    teacher, student = tiny(seed=1, img_size=(64, 32)), tiny(seed=2)
    with pytest.raises(TransferError, match="interpolate_grid"):
        DualViT(teacher, student)
    with pytest.raises(TransferError, match="8x4"):
        DualViT(teacher, student, "copy")


@pytest.mark.parametrize("family", ["vit", "dinov2_registers", "beit", "eva02"])
def test_student_equal_to_teacher(family: str) -> None:
    teacher, x = tiny(family), images()
    kl = DualViT(teacher, copy.deepcopy(teacher), "distill", loss="kl")(x).transfer_loss
    assert abs(float(kl)) < 1e-12
    copied = DualViT(teacher, copy.deepcopy(teacher), "copy")(x).logits
    assert relative_error(copied, teacher(x)) < 1e-12


def test_match_finds_permuted_heads() -> None:
    teacher, x = tiny(seed=1), images()
    student, order = copy.deepcopy(teacher), [2, 0, 3, 1]
    for block in student.blocks:
        qkv = block.attn.qkv
        for tensor in (qkv.weight.data, qkv.bias.data):
            heads = tensor.view(3, 4, 8, -1)
            heads.copy_(heads[:, order].clone())
        weight = block.attn.proj.weight.data.view(-1, 4, 8)
        weight.copy_(weight[:, order].clone())
    dual = DualViT(teacher, student, heads="match", calibration=x, loss="kl")
    assert all(link.heads.groups == tuple((h,) for h in order) for link in dual.plan.links)
    assert abs(float(dual(x).transfer_loss.detach())) < 1e-12
    with pytest.raises(TransferError, match="calibration"):
        DualViT(teacher, copy.deepcopy(student), heads="match")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "copy_q", "embed_dim": 48}, "heads of one width"),
        ({"method": "distill", "heads": "mean", "loss": "kl", "num_heads": 8}, "loss=kl"),
        ({"method": "distill_q", "heads": "mean", "num_heads": 8, "embed_dim": 64}, "averages maps"),
        ({"method": "distill", "num_heads": 8}, "mean"),
        ({"method": "distill", "layers": "first:9"}, "first:9"),
        ({"method": "logits", "num_classes": 7}, "set of classes"),
        ({"method": "distill", "in_chans": 1}, "in_chans"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_by_name(options: dict[str, object], message: str) -> None:
    transfer = {key: options[key] for key in ("method", "heads", "loss", "layers") if key in options}
    teacher = tiny(seed=1, **{key: value for key, value in options.items() if key not in transfer})
    with pytest.raises(TransferError, match=message):
        DualViT(teacher, tiny(seed=2), **transfer)


def test_a_bias_that_other_heads_still_use_is_trained() -> None:
    teacher, student = tiny(seed=1), tiny("beit_shared", seed=2)
    dual = DualViT(teacher, student, "copy", heads=[0, 3])
    dual(images()).logits.square().sum().backward()
    assert student.rel_pos_bias.relative_position_bias_table.grad.any()
    dual.release(bare=True)
    DualViT(teacher, student, "copy")
    assert not student.rel_pos_bias.relative_position_bias_table.requires_grad


def large(family: str, seed: int) -> nn.Module:
    """A model whose queries, keys and values are 300 times as large: logits of tens of thousands."""
    model = tiny(family, seed=seed, dtype=torch.float32)
    for block in model.blocks:
        block.norm1.weight.data.fill_(1)
        block.attn.qkv.weight.data.mul_(300)
    return model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(
            (family, {"method": method})
            for family in ("vit", "beit", "dinov3")
            for method in ("copy", "copy_q", "distill", "attention_output")
        ),
        ("vit", {"loss": "kl", "temperature": 2.0, "rows": 0.5}),
    ],
)
def test_gradients_are_finite_where_logits_are_large(family: str, options: dict[str, Any]) -> None:
    student = large(family, 2)
    dual = DualViT(large(family, 1), student, **options).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = dual(images(dtype=torch.float32))
        loss = out.logits.float().square().mean() + out.transfer_loss
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(gradient(student).isfinite().all())
    assert float(gradient(student).norm()) > 0


@pytest.mark.parametrize("family", ["vit", "beit"])
@pytest.mark.parametrize("method", ["copy", "distill"])
def test_single_precision_with_large_logits(method: str, family: str) -> None:
    gradients, logits = [], []
    for dtype in (torch.float32, torch.float64):
        teacher, student = large(family, 1).to(dtype), large(family, 2).to(dtype)
        out = DualViT(teacher, student, method)(images(dtype=dtype))
        (out.logits.square().mean() + out.transfer_loss).backward()
        gradients.append(gradient(student))
        logits.append(out.logits)
    assert relative_error(*logits) < 1e-3
    assert relative_error(*gradients) < 1e-2


SMALL: dict[str, Any] = {
    "embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": (16, 24), "patch_size": 4, "num_classes": 3,
}  # fmt: skip


IMAGES = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    """A model whose attention is far from uniform, and whose logits depend on it."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name or "head.weight" in name:
                parameter.mul_(20)
    return model


@pytest.mark.parametrize("method", ["attention_output", "block_output", "feature", "logits"])
def test_what_comes_out_of_a_converted_layer_is_matched(method: Any) -> None:
    teacher = vit()
    student = convert(teacher, "1-2: linear")
    dual = DualViT(teacher, student, method, **only_read(method, weight=50.0, reduction="mean")).train()
    out = dual(IMAGES)
    out.transfer_loss.backward()
    assert float(out.transfer_loss.detach()) > 0
    assert all(layer.qkv.weight.grad is not None for layer in converted_layers(student).values())
    if method == "attention_output":
        assert set(out.parts) == {"layer00", "layer01", "layer02"}
        assert float(out.parts["layer00"]) == 0  # the kept layer of an unchanged copy


def test_the_error_is_that_of_the_layers_own_operator() -> None:
    teacher = vit()
    student = convert(teacher, "0: linear")
    seen: dict[str, torch.Tensor] = {}
    layer: Any = converted_layers(student)[0]
    layer.operator.register_forward_hook(lambda module, inputs, out: seen.update(out=out))
    dual = DualViT(teacher, student, "attention_output", layers=[0])
    part = dual(IMAGES).parts["layer00"]
    block: Any = teacher.blocks[0]
    tokens = block.norm1(teacher.norm_pre(teacher._pos_embed(teacher.patch_embed(IMAGES))))
    q, k, v = block.attn.qkv(tokens).reshape(2, 25, 3, 2, 8).permute(2, 0, 3, 1, 4)
    target = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(part, (seen["out"] - target).square().mean())


def test_the_student_is_released_as_it_was() -> None:
    teacher = vit()
    student = convert(teacher, "0: linear")
    before = student.eval()(IMAGES)
    dual = DualViT(teacher, student, "attention_output")
    dual(IMAGES)
    released = dual.release()
    assert list(converted_layers(released)) == [0]
    assert not converted_layers(released)[0].operator._forward_hooks
    assert torch.equal(released.eval()(IMAGES), before)


@pytest.mark.parametrize(
    ("operator", "method", "remedy"),
    [
        *(
            ("linear", method, r"use mode=align, or transfer\.method")
            for method in ("copy", "distill", "copy_v", "distill_q")
        ),
        ("attnzero_105", "distill", r"use mode=align with align\.match=output, or transfer\.method"),
    ],
)
def test_maps_of_a_converted_layer_are_refused_by_name(operator: str, method: Any, remedy: str) -> None:
    teacher = vit()
    with pytest.raises(
        TransferError, match=f"layer 1 of the student has {operator} in place of softmax.*{remedy}"
    ):
        DualViT(teacher, convert(teacher, f"1: {operator}"), method)


@pytest.mark.parametrize("method", ["copy", "distill", "attention_output"])
def test_a_converted_teacher_has_no_attention_to_give(method: Any) -> None:
    student = vit()
    with pytest.raises(TransferError, match="layer 1 of the teacher has linear"):
        DualViT(convert(vit(), "1: linear"), student, method)
    assert DualViT(convert(vit(), "1: linear"), student, "logits")(IMAGES).transfer_loss.isfinite()
