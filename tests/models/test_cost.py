"""The analytic count against torch's counter and published tables."""

from __future__ import annotations

import pytest
import timm
import torch
from graftvit.models.attention.base import Geometry, LayerShape, Operations
from graftvit.models.attention.hash import HashAttention
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.cost import attention_macs, copied_macs, count_operations, dense_macs, other_macs
from graftvit.models.errors import UnsupportedModelError
from graftvit.models.small import without_memory
from support.models import dense
from support.models.copied_models import CASES, MAPS, pair, whole
from support.models.method_cases import COPIES
from support.models.pyramids import SIZES, TINY, tiny
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# BEiT and EVA-02 call their fused weight through F.linear too; siglip pools by attention, which is not counted.
FAMILIES = [family for family in dense.FAMILIES if family != "siglip"]


def counted(model: nn.Module, size: tuple[int, int]) -> int:
    """The multiply-adds of all products, by torch's counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(torch.zeros(1, 3, *size))
    return counter.get_total_flops() // 2


def products(model: nn.Module) -> int:
    count = count_operations(model)
    return (count.linear + count.convolution + count.attention).multiplications


@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_plain_models_are_those_of_torchs_counter(family: str) -> None:
    model, size = dense.tiny(family, dtype=torch.float32), (32, 48)
    assert products(model) == dense_macs(model) + sum(attention_macs(model)) == counted(model, size)
    student = convert(model, "*: softmax; 0: uniform") if "beit" not in family else model
    assert products(student) == pytest.approx(counted(student, size), rel=0.02)


@pytest.mark.parametrize("plan", [None, "stage1: none; stage2.1: linear", "*: softmax"])
@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("kind", TINY)
def test_products_of_pyramids_are_those_of_torchs_counter(
    kind: str, size: tuple[int, int], plan: str | None
) -> None:
    """At sizes that windows do not divide, too."""
    model = tiny(kind, size)
    model = model if plan is None else convert(model, plan, without=["bias"])
    assert sum(attention_macs(model)) + other_macs(model) == counted(model, size)
    assert plan is not None or products(model) == counted(model, size)


def test_what_an_operator_brings_counts_as_its_own() -> None:
    model = dense.tiny(dtype=torch.float32)
    assert {dense_macs(convert(model, f"*: {name}")) for name in ("ttt", "hybrid", "keep")} == {
        dense_macs(model)
    }


@pytest.mark.parametrize(
    ("case", "method"), [(c, m) for c in CASES for m in COPIES] + [(c, "copy") for c in MAPS]
)
def test_a_copying_student_is_counted(case: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.compiler, "is_exporting", lambda: True
    )  # the counter does not know our operator
    alone = whole(*pair(case, method, torch.float32))
    assert sum(copied_macs(alone)) == counted(alone, (32, 48))


# Multiplications and additions of whole models: EcoFormer's published tables, and torch's own counter.


HASHED = "stage1: hash; stage2: hash; stage3: hash; stage4: softmax"
PUBLISHED = [
    ("pvt_v2_b0", HASHED, 527_223_168, 0.5354, 0.5648, 2.4893),
    ("pvt_v2_b1", HASHED, 2_018_628_352, 2.0296, 2.0888, 9.3896),
    ("pvt_v2_b2", HASHED, 3_833_895_680, 3.8528, 3.9651, 17.8239),
    ("pvt_v2_b3", HASHED, 6_516_304_640, 6.5414, 6.7151, 30.2469),  # their README has 6.75 G additions
    ("pvt_v2_b4", HASHED, 9_538_053_888, 9.5712, 9.8235, 44.2546),
    ("twins_svt_small", HASHED, 2_691_676_672, 2.7189, 2.8080, 12.5871),
    ("pvt_v2_b0", "*: softmax", 550_103_424, 2.0159, 1.9933, 9.2527),
    ("pvt_v2_b1", "*: softmax", 2_110_149_376, 5.0191, 4.9966, 23.0677),
    ("pvt_v2_b2", "*: softmax", 4_044_233_472, 8.6406, 8.6050, 39.7147),
    ("pvt_v2_b3", "*: softmax", 6_967_487_232, 11.8612, 11.8233, 54.5274),
    ("pvt_v2_b4", "*: softmax", 10_221_250_304, 15.9723, 15.9277, 73.4324),
    ("twins_svt_small", "*: softmax", 2_871_507_456, 5.9578, 5.9104, 27.3634),
]
"""Model, plan, operations of layers other than attention, and in billions multiplications, additions and pJ."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "plan", "rest", "multiplications", "additions", "energy"), PUBLISHED)
def test_the_published_tables(
    name: str, plan: str, rest: int, multiplications: float, additions: float, energy: float
) -> None:
    with without_memory():
        model = timm.create_model(name)
    count = count_operations(convert(model, plan), "published")
    assert count.linear + count.convolution + count.norm == Operations(rest, rest)
    assert count.total.multiplications / 1e9 == pytest.approx(multiplications, abs=5e-5)
    assert count.total.additions / 1e9 == pytest.approx(additions, abs=5e-5)
    picojoules = 3.7 * count.total.multiplications + 0.9 * count.total.additions
    assert picojoules / 1e9 == pytest.approx(energy, abs=5e-5)


@pytest.mark.parametrize(("side", "heads", "operations"), [
    (56, 1, (1_564_864, 9_683_968)), (28, 2, (782_432, 4_841_984)), (14, 5, (489_020, 3_026_240)),
])  # fmt: skip
def test_the_published_count_of_one_block(side: int, heads: int, operations: tuple[int, int]) -> None:
    operator = HashAttention(LayerShape(heads, 32, Geometry(0, (side, side))))
    assert operator.operations(operator.shape.geometry, "published") == Operations(*operations)


def test_the_true_count_of_one_token() -> None:
    """Written down step by step for one head."""
    width, bits, anchors = 8, 5, 7
    operator = HashAttention(LayerShape(1, width, Geometry(0, (1, 1))), bits=bits, anchors=anchors)
    unit = Operations(2 * width, width)
    kernels = Operations(anchors * width, anchors * width)
    functions = Operations(anchors * bits, anchors * bits)
    sums = Operations(0, bits * width + bits)  # of z v and of z over the tokens
    outputs = Operations(width, bits * width + bits + width)  # z times both sums, plus c v, over the row sum
    assert operator.operations(Geometry(0, (1, 1))) == unit + kernels + functions + sums + outputs


def test_a_projection_that_a_converted_layer_does_not_need_is_not_counted() -> None:
    model = dense.tiny(dtype=torch.float32)
    student = convert(model, "1: hash")
    whole, without = count_operations(model), count_operations(student)
    fused = model.get_submodule("blocks.1.attn.qkv")
    tokens = converted_layers(student)[1].geometry.num_tokens
    assert isinstance(fused, nn.Linear)
    lost = tokens * fused.in_features * fused.out_features // 3
    assert whole.linear.multiplications - without.linear.multiplications == lost
    assert whole.linear.additions - without.linear.additions == lost + tokens * fused.out_features // 3


def test_biases_are_additions_and_norms_are_counted() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4), nn.Flatten(2), nn.LayerNorm(12544), nn.Linear(12544, 5)
    )
    true, published = count_operations(model), count_operations(model, "published")
    convolved, normed, out = 4 * 112**2, 4 * 112**2, 4 * 5
    assert true.convolution == Operations(12 * convolved, 13 * convolved)
    assert published.convolution == Operations(13 * convolved, 13 * convolved)
    assert true.linear == Operations(out * 12544, out * 12544 + out)
    assert published.linear == Operations(out * 12544, out * 12544)
    assert true.norm == Operations(4 * normed, 5 * normed)
    assert published.norm == Operations(4 * normed, 4 * normed)


def test_a_model_without_attention_is_counted_and_unknown_attention_refused() -> None:
    convnext = timm.create_model("test_convnext", num_classes=3)
    size = convnext.pretrained_cfg["input_size"][1]
    assert products(convnext) == counted(convnext, (size, size))
    with pytest.raises(UnsupportedModelError, match="attention of a kind whose operations are not known"):
        count_operations(timm.create_model("crossvit_9_240"))


def test_the_model_is_left_as_it_was() -> None:
    model = convert(dense.tiny(dtype=torch.float32), "1: linear").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_operations(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model(dense.images(1, dtype=torch.float32)).isfinite().all()
