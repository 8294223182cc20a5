"""Alignment and layer search of pyramids, against what timm's own layers compute."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.errors import TransferError
from graftvit.models.families import sites
from graftvit.transfer.analysis.compare.comparison_cells import layer_errors
from graftvit.transfer.recovery.align import Alignment
from graftvit.transfer.recovery.layer_search import search_layers, tokens_of
from support.models.pyramids import SIZES, images, tiny
from timm.models.swin_transformer import window_reverse
from torch import Tensor, nn

KINDS = ("pvt", "pvt_li", "svt", "pcpvt", "swin", "swinv2")
PLAN = "stage1: linear; stage2.0: softmax"


def student_of(teacher: nn.Module, plan: str = PLAN) -> nn.Module:
    """Return a conversion whose layers are not the teacher's any more."""
    student = convert(teacher, plan, without=["bias"])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student


def grid_of(windows: Tensor, block: Any) -> Tensor:
    """Return timm's windows (B·W, M, C) of a block of Swin as tokens (B, N, C) of the grid."""
    height, width = block.input_resolution
    rows, columns = block.window_size
    padded = -(-height // rows) * rows, -(-width // columns) * columns
    x = window_reverse(windows.unflatten(1, (rows, columns)), block.window_size, *padded)
    x = x[:, :height, :width].roll(tuple(block.shift_size), (1, 2))
    return x.flatten(1, 2)


def reference(teacher: nn.Module, student: nn.Module, batch: Tensor) -> dict[int, Tensor]:
    """Return the mean squared errors of the inputs of the output projections."""
    losses: dict[int, Tensor] = {}
    for site in sites(teacher):
        if site.index not in converted_layers(student):
            continue
        block: Any = site.block(teacher)
        layer = converted_layers(student)[site.index]
        seen: dict[str, Any] = {}
        hooks = [
            block.register_forward_pre_hook(lambda _, given, seen=seen: seen.update(block=given)),
            block.norm1.register_forward_hook(lambda *given, seen=seen: seen.update(norm=given[2])),
            block.attn.proj.register_forward_pre_hook(lambda _, given, seen=seen: seen.update(out=given[0])),
        ]
        with torch.no_grad():
            teacher(batch)
        [hook.remove() for hook in hooks]
        windowed = hasattr(block, "shift_size")
        target = grid_of(seen["out"], block) if windowed else seen["out"]
        own: dict[str, Tensor] = {}
        proj: Any = layer.proj
        hook = proj.register_forward_pre_hook(lambda _, given, own=own: own.update(out=given[0]))
        if not windowed:
            layer(seen["norm"], *seen["block"][1:])
        else:  # the block of Swin V2 has its norm after the attention
            layer(seen["block"][0] if hasattr(block.attn, "logit_scale") else seen["norm"])
        hook.remove()
        losses[site.index] = F.mse_loss(own["out"], target)
    return losses


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_timms_layers(kind: str, size: str) -> None:
    teacher = tiny(kind, SIZES[size]).double()
    student = student_of(teacher).eval()
    batch = images(SIZES[size]).double()
    state, modules = dict(teacher.state_dict()), list(teacher.modules())
    alignment = Alignment(teacher, student)
    found, wanted = alignment(batch), reference(teacher, student, batch)
    assert found.keys() == wanted.keys() == set(converted_layers(student))
    for index, loss in found.items():
        assert float(loss) == pytest.approx(float(wanted[index]), rel=1e-5)
    assert list(teacher.modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())
    torch.stack(list(found.values())).sum().backward()
    learned = {id(parameter) for parameter in student.parameters() if parameter.grad is not None}
    assert learned == {id(parameter) for parameter in alignment.used_parameters()}


@pytest.mark.parametrize("match", ["map", "probes", "rows"])
def test_maps_are_compared_where_the_teachers_are_of_all_tokens(match: str) -> None:
    teacher = tiny("pvt")  # without a reduction in the second stage
    losses = Alignment(teacher, student_of(teacher, "stage2: linear"), match)(images((32, 32)))
    torch.stack(list(losses.values())).sum().backward()
    for kind in ("pvt", "svt", "swin", "swinv2"):
        with pytest.raises(TransferError, match=f"match={match}: layer 0 of the teacher has windows"):
            Alignment(tiny(kind), student_of(tiny(kind)), match)


def test_another_model_is_refused() -> None:
    with pytest.raises(TransferError, match=r"the teacher is a Twins .* and the student a PyramidVision"):
        Alignment(tiny("svt"), student_of(tiny("pvt")))
    with pytest.raises(
        TransferError, match="layer 0 has 1 heads of 8, width 8 and 8x8 tokens in the teacher"
    ):
        Alignment(tiny("pvt"), student_of(tiny("pvt", (48, 48))))


@pytest.mark.parametrize("kind", ["pvt", "svt", "swin", "swinv2"])
def test_each_choice_is_the_best_of_its_round(kind: str) -> None:
    teacher = tiny(kind).double()
    student, batch = convert(teacher, "0: linear; 2: linear", without=["bias"]), images((32, 32)).double()
    before = student(batch)
    found = search_layers(teacher, student, [(batch, batch)], keep=2)
    target = tokens_of(teacher, batch)
    errors = {}
    for kept in itertools.product((True, False), repeat=2):
        plan = f"0: {'keep' if kept[0] else 'linear'}; 2: {'keep' if kept[1] else 'linear'}"
        tokens = tokens_of(convert(teacher, plan, without=["bias"]), batch)
        errors[kept] = float((tokens - target).norm() / target.norm())
    assert found.error == pytest.approx(errors[False, False], rel=1e-4)
    first = found.kept[0]
    assert first.error == pytest.approx(min(errors[True, False], errors[False, True]), rel=1e-4)
    assert found.kept[1].error < 1e-6
    assert found.plan_keeping(2) == "*: keep"
    assert torch.equal(student(batch), before)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_errors_are_relative_errors_of_the_same_outputs(kind: str) -> None:
    teacher = tiny(kind, (40, 24)).double()
    student, batch = student_of(teacher).eval(), images((40, 24)).double()
    modules = list(teacher.modules())
    found, squares = layer_errors(teacher, student, [batch]), reference(teacher, student, batch)
    assert list(teacher.modules()) == modules
    targets = {index: alignment_target(teacher, index, batch) for index in squares}
    for index, error in squares.items():
        wanted = float(error / targets[index].square().mean()) ** 0.5
        assert found[index] == pytest.approx(wanted, rel=1e-5)


def alignment_target(teacher: nn.Module, index: int, batch: Tensor) -> Tensor:
    """Return the inputs of the output projection of timm's layer, without those of padded tokens."""
    block: Any = sites(teacher)[index].block(teacher)
    seen: list[Tensor] = []
    hook = block.attn.proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        teacher(batch)
    hook.remove()
    return grid_of(seen[0], block) if hasattr(block, "shift_size") else seen[0]
