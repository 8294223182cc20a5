"""Every operator in every family: converted, trained, saved, loaded, resized."""

from __future__ import annotations

import copy
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import graftvit.checkpoints.pretrained as loading
import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.models.attention.base import AttentionOperator, Geometry, LayerShape
from graftvit.models.attention.softmax import SoftmaxAttention
from graftvit.models.calibration import fit_at_random
from graftvit.models.conversion import (
    ConvertedAttention,
    convert,
    converted_layers,
    new_parameters,
    plan_of,
    resize,
)
from graftvit.models.converted import TokenGrid
from graftvit.models.errors import UnsupportedModelError
from graftvit.models.families import attention_shape, token_layout
from graftvit.models.layer_plan import OPERATORS, Choice
from support.models import dense
from support.models.operator_cases import CASES
from torch import Tensor, nn

FIRST = {case.operator: case for case in reversed(CASES) if case.operator != "softmax"}
"""The first case of each operator; `test_every_operator_has_a_case` holds the table to that."""
BIASED = ("beit", "beit_shared")
FAMILIES = [family for family in dense.FAMILIES if family not in BIASED]
SIZE, OTHER = (32, 48), (48, 24)
TYPICAL = ("linear", "window")
"""Operators of every token alike and of the grid, which meet every family; the others meet `eva02` and one more."""


OTHERS = [operator for operator in FIRST if operator not in TYPICAL]
PLAIN = [family for family in FAMILIES if family != "eva02"]


def arguments_of(family: str) -> tuple[str, dict[str, Any]]:
    name, options = dense.FAMILIES[family]
    return name, {**dense.TINY, "depth": 1, "embed_dim": 16, "num_heads": 2, **options}


@cache
def teacher(family: str, **changes: Any) -> nn.Module:
    """A random model; `convert` copies it, so that all tests can have the same one."""
    _, arguments = arguments_of(family)
    return dense.tiny(family, dtype=torch.float32, **{**arguments, **changes})


def images(size: tuple[int, int] = SIZE) -> Tensor:
    return dense.images(2, dtype=torch.float32, size=size)


def plan(operator: str) -> str:
    return f"*: {FIRST[operator]}"


def ready(model: nn.Module, plan: str) -> nn.Module:
    """Convert a model; operators that must be fitted can run."""
    student = convert(model, plan)
    fit_at_random(converted_layers(student))
    return student


def save(model: nn.Module, family: str, folder: Path, **changes: Any) -> str:
    name, arguments = arguments_of(family)
    write_student(
        model,
        folder,
        architecture=name,
        model_args={**arguments, **changes},
        preprocessing=Preprocessing.of(model, mean=(0.5,) * 3, std=(0.5,) * 3),
    )
    return str(folder)


def train_a_step(student: nn.Module) -> None:
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    student(images()).square().mean().backward()
    unused = _unused(student)
    for name, parameter in student.named_parameters():
        if name in unused:
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), f"{name} has a gradient that is not finite"
    optimizer.step()
    student.eval()


def _unused(student: nn.Module) -> set[str]:
    """Parameters of projections that an operator has no use for, as uniform attention of queries and keys."""
    return {
        f"blocks.{index}.attn.{name}"
        for index, layer in converted_layers(student).items()
        for name, _ in layer.named_parameters()
        if name[:2] in {f"{part}_" for part in "qkv" if part not in layer.operator.needs}
    }


def test_every_operator_has_a_case() -> None:
    assert set(OPERATORS) == {*FIRST, "softmax"}


@pytest.mark.parametrize(
    ("operator", "family"),
    [
        *((operator, family) for operator in TYPICAL for family in FAMILIES),
        *((operator, "eva02") for operator in OTHERS),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in zip(OTHERS, cycle(PLAIN), strict=False)),
    ],
)
def test_an_operator_in_a_family(operator: str, family: str, tmp_path: Path) -> None:
    model = teacher(family)
    student = ready(model, plan(operator)).eval()
    train_a_step(student)
    folder = save(student, family, tmp_path / "student")
    logits = student(images())
    loaded = loading.load(folder)
    assert plan_of(loaded) == plan_of(student) == plan(operator)
    assert torch.equal(loaded(images()), logits)
    resize(student, OTHER)
    resized = student(images(OTHER))
    assert resized.isfinite().all()
    assert torch.equal(loading.load(folder, img_size=OTHER)(images(OTHER)), resized)


@pytest.mark.parametrize("family", dense.FAMILIES)
def test_softmax_as_an_operator_gives_the_same_bits(family: str) -> None:
    model = teacher(family)
    layout, shape = token_layout(model), attention_shape(model)
    tokens = TokenGrid(model, Geometry(layout.num_prefix, layout.grid), SIZE)
    expected = model(images())
    assert torch.equal(convert(model, "*: softmax")(images()), expected)
    assert torch.equal(convert(model, "0: keep")(images()), expected)
    model = copy.deepcopy(model)
    for block in cast(Any, model).blocks:
        operator = SoftmaxAttention(LayerShape(shape.num_heads, shape.head_dim, tokens.geometry))
        block.attn = ConvertedAttention(block.attn, operator, Choice("softmax"), tokens)
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_plan_keeps_what_it_keeps(family: str, tmp_path: Path) -> None:
    model = teacher(family, depth=4)
    names = list(FIRST)
    student = ready(model, f"*: {FIRST[names[0]]}; 1: keep; 3: {FIRST[names[-1]]}").eval()
    assert list(converted_layers(student)) == [0, 2, 3]
    kept, own = cast(Any, student).blocks[1], cast(Any, model).blocks[1]
    assert type(kept.attn) is type(own.attn)
    folder = save(student, family, tmp_path / "student", depth=4)
    assert torch.equal(loading.load(folder)(images()), student(images()))


def test_layers_share_what_their_operator_has_in_common(tmp_path: Path) -> None:
    apart, shared = (
        convert(teacher("vit", depth=4), f"*: linformer(sharing={sharing}); 1: keep").eval()
        for sharing in ("headwise", "layerwise")
    )
    train_a_step(shared)
    assert 0 < len(new_parameters(shared)) < len(new_parameters(apart))
    folder = save(shared, "vit", tmp_path / "student", depth=4)
    assert torch.equal(loading.load(folder)(images()), shared(images()))
    twin = copy.deepcopy(shared)
    for model in (shared, twin):
        resize(model, OTHER)
    assert torch.equal(loading.load(folder, img_size=OTHER)(images(OTHER)), shared(images(OTHER)))
    with torch.no_grad():
        for parameter in new_parameters(twin):
            parameter.normal_()
    assert not torch.equal(twin(images(OTHER)), shared(images(OTHER)))


@pytest.mark.parametrize("family", BIASED)
@pytest.mark.parametrize("operator", FIRST)
def test_a_relative_bias_is_refused_or_honoured(operator: str, family: str) -> None:
    model = teacher(family, depth=2)
    shape = LayerShape(2, 8, Geometry(1, (4, 6)))
    if FIRST[operator].build(shape.geometry).traits.bias:
        assert convert(model, plan(operator))(images()).isfinite().all()
        return
    with pytest.raises(
        UnsupportedModelError, match=rf"plan: layer 1 has a relative position bias.* {operator} "
    ):
        convert(model, f"1: {FIRST[operator]}")


@pytest.mark.parametrize("operator", TYPICAL)
@pytest.mark.parametrize(
    ("family", "prefix"), [("vit_no_prefix", 0), ("vit", 1), ("deit_distilled", 2), ("dinov2_registers", 5)]
)
def test_prefix_tokens_are_known_to_the_operator(operator: str, family: str, prefix: int) -> None:
    student = ready(teacher(family), plan(operator)).eval()
    assert student(images()).isfinite().all()
    for layer in converted_layers(student).values():
        assert layer.geometry == Geometry(prefix, (4, 6))
        assert cast(AttentionOperator, layer.operator).shape.geometry == layer.geometry


@pytest.mark.parametrize("operator", FIRST)
def test_a_resized_student_is_saved_as_it_is(operator: str, tmp_path: Path) -> None:
    student = ready(teacher("vit"), plan(operator)).eval()
    resize(student, OTHER)
    folder = save(student, "vit", tmp_path / "student", img_size=OTHER)
    assert torch.equal(loading.load(folder)(images(OTHER)), student(images(OTHER)))
    resize(student, (64, 64))
    assert torch.equal(loading.load(folder, img_size=64)(images((64, 64))), student(images((64, 64))))


@pytest.mark.parametrize("operator", FIRST)
def test_a_free_image_size_reaches_the_operator(operator: str) -> None:
    fixed = ready(teacher("vit"), plan(operator)).eval()
    student = convert(teacher("vit", dynamic_img_size=True), plan(operator)).eval()
    student.load_state_dict(fixed.state_dict())
    assert torch.equal(student(images()), fixed(images()))
    assert student(images(OTHER)).isfinite().all()
    assert all(layer.geometry.grid == (6, 3) for layer in converted_layers(student).values())
    assert torch.equal(student(images()), fixed(images()))
