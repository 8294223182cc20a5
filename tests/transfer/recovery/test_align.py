"""Alignment: each layer learns from the teacher's inputs, alone, and ends at the teacher's output."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import timm
import torch
from graftvit.models.attention.base import Geometry
from graftvit.models.attention.softmax import softmax_rows
from graftvit.models.conversion import convert, converted_layers, new_parameters, resize
from graftvit.models.errors import TransferError
from graftvit.models.families import blocks_of
from graftvit.transfer.recovery.align import (
    LAYER_LOSSES,
    Alignment,
    LayerTarget,
    map_error,
    output_error,
    probe_error,
    row_error,
)
from support.models.operator_cases import Case, draw
from torch import nn

SMALL: dict[str, Any] = {
    "embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": (16, 24), "patch_size": 4, "num_classes": 3,
}  # fmt: skip
IMAGES = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
GEOMETRY = Geometry(1, (5, 7))


def vit(name: str = "vit_tiny_patch16_224", **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **more}).eval()


def test_losses_are_their_equations() -> None:
    operator = Case("linear").build(GEOMETRY)
    student, teacher = draw(GEOMETRY), draw(GEOMETRY, seed=1)
    _, _, v_s = student.qkv()
    _, _, v_t = teacher.qkv()
    theirs, ours = softmax_rows(teacher, slice(None)), operator.matrix(student)
    target = LayerTarget(teacher, theirs @ v_t)
    tokens = GEOMETRY.num_tokens
    assert float(output_error(operator, student, target)) == pytest.approx(
        float((ours @ v_s - theirs @ v_t).square().mean()), rel=1e-9
    )
    exact = float((ours - theirs).square().sum((2, 3)).mean() / tokens)
    assert float(map_error(operator, student, target)) == pytest.approx(exact, rel=1e-6)
    torch.manual_seed(0)
    estimates = torch.stack([probe_error(operator, student, target) for _ in range(400)])
    assert float(estimates.mean()) == pytest.approx(exact, rel=0.05)
    rows = torch.stack([row_error(operator, student, target) for _ in range(50)])
    all_rows = -(theirs * ours.log()).sum(-1)
    assert float(rows.mean()) == pytest.approx(float(all_rows.mean()), rel=0.05)


@pytest.mark.parametrize("loss", sorted(LAYER_LOSSES))
def test_every_loss_falls(loss: str) -> None:
    teacher = vit()
    student = convert(teacher, "*: linear")
    alignment = Alignment(teacher, student, loss)
    parameters = [
        p for layer in converted_layers(student).values() for p in cast(Any, layer).qkv.parameters()
    ]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0)
    totals = []
    for _ in range(60):
        torch.manual_seed(1)  # the same rows and probes each time
        total = torch.stack(list(alignment(IMAGES).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total))
    assert totals[-1] < 0.9 * totals[0] or (loss == "rows" and totals[-1] < totals[0])


def test_layers_do_not_touch_each_other() -> None:
    teacher = vit()
    student = convert(teacher, "0: linear; 2: linear")
    losses = Alignment(teacher, student)(IMAGES)
    assert set(losses) == {0, 2}
    losses[2].backward()
    layers = converted_layers(student)
    assert cast(Any, layers[2]).qkv.weight.grad is not None
    assert all(parameter.grad is None for parameter in layers[0].parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_inputs_are_the_teachers() -> None:
    """What layer 0 of the student does has no part in the loss of layer 1."""
    teacher = vit()
    student = convert(teacher, "0-1: linear")
    before = Alignment(teacher, student)(IMAGES)
    cast(Any, student).blocks[0].attn.qkv.weight.data.mul_(3)
    after = Alignment(teacher, student)(IMAGES)
    assert float(after[1]) == float(before[1])
    assert float(after[0]) != float(before[0])


def test_the_teacher_is_left_alone() -> None:
    teacher = vit().train()
    state, modules = copy.deepcopy(teacher.state_dict()), list(teacher.modules())
    alignment = Alignment(teacher, convert(teacher, "1: linear"))
    alignment.train()(IMAGES)
    assert list(teacher.modules()) == modules
    assert all(torch.equal(state[key], tensor) for key, tensor in teacher.state_dict().items())
    names = [name for name, _ in alignment.named_parameters()]
    assert names
    assert all(name.startswith("student.") for name in names)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("eva02_tiny_patch14_224", {"patch_size": 4}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_other_families(name: str, more: Any) -> None:
    teacher = vit(name, **{"num_heads": 4, **more})
    losses = Alignment(teacher, convert(teacher, "*: linear"))(IMAGES)
    assert len(losses) == 3
    torch.stack(list(losses.values())).sum().backward()


def test_programs_are_aligned_by_their_outputs() -> None:
    teacher = vit()
    student = convert(teacher, "*: attnzero_105; 0: program(code=add(l2(nt(v tn(k v))) q))")
    losses = Alignment(teacher, student)(IMAGES)
    torch.stack(list(losses.values())).sum().backward()
    assert all(
        x.grad is not None and x.grad.any() for n, x in student.named_parameters() if ".attn.qkv." in n
    )
    with pytest.raises(TransferError, match="map"):
        Alignment(teacher, student, "map")


def test_mistakes_are_named() -> None:
    teacher = vit()
    with pytest.raises(TransferError, match="no layer of the student is converted"):
        Alignment(teacher, vit())
    with pytest.raises(TransferError, match=r"align\.match=outpt; did you mean 'output'"):
        Alignment(teacher, convert(teacher, "*: linear"), "outpt")
    with pytest.raises(TransferError, match="have no cross-entropy"):
        Alignment(teacher, convert(teacher, "*: kernel(feature=relu)"), "rows")
    with pytest.raises(TransferError, match="both need the same"):
        Alignment(vit(depth=2), convert(teacher, "*: linear"))
    with pytest.raises(
        TransferError,
        match=r"cls \+ 6x4 patches, .* cls \+ 4x6 patches: both need the same; leave teacher\.img_size",
    ):
        Alignment(vit(img_size=(24, 16)), convert(teacher, "*: linear"))
    free, fixed = vit(dynamic_img_size=True), convert(teacher, "*: linear")
    with pytest.raises(TransferError, match="images of 24x16 have the patch grid 6x4 in the teacher"):
        Alignment(free, fixed)(torch.zeros(1, 3, 24, 16))


def test_images_of_another_size_have_their_own_grid() -> None:
    free = vit(dynamic_img_size=True).double()
    images = torch.randn(2, 3, 24, 8, dtype=torch.float64)
    found = Alignment(free, convert(free, "*: window(window=2)"))(images)
    sized = convert(free, "*: window(window=2)")
    for model in (sized, free):
        resize(model, (24, 8))
    wanted = Alignment(free, sized)(images)
    assert {index: float(loss) for index, loss in found.items()} == {
        index: pytest.approx(float(loss), rel=1e-12) for index, loss in wanted.items()
    }


def test_new_parameters_are_those_of_operators() -> None:
    assert new_parameters(convert(vit(), "*: linear")) == []


@pytest.mark.parametrize("loss", ["map", "probes", "rows"])
def test_maps_without_a_parameter_are_refused_where_no_other_layer_learns(loss: str) -> None:
    teacher = vit()
    uniform = convert(teacher, "*: uniform")
    with pytest.raises(
        TransferError, match=f"align.match={loss}: the maps of uniform depend on no parameter"
    ):
        Alignment(teacher, uniform, loss)
    assert all(each.requires_grad for each in Alignment(teacher, uniform, "output")(IMAGES).values())
    alignment = Alignment(teacher, convert(teacher, "0: uniform; 2: linear"), loss)
    losses = alignment(IMAGES)
    assert {index: each.requires_grad for index, each in losses.items()} == {0: False, 2: True}
    alignment.freeze_others()  # DDP waits for the gradient of every parameter that is not frozen
    first, _, last = blocks_of(alignment.student)
    assert not any(parameter.requires_grad for parameter in first.parameters())
    sum(losses.values()).backward()
    learned = [p for p in last.parameters() if p.requires_grad]
    assert learned
    assert all(p.grad is not None for p in learned)
