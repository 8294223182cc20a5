"""Families that teach each other, by every method, as a dense reference or refused by name; steps of pyramids."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graftvit.models.attention.base import Heads
from graftvit.models.conversion import convert
from graftvit.models.copied import resize
from graftvit.models.copying.teacher_view import Normalization
from graftvit.models.errors import TransferError
from graftvit.models.families import blocks_of
from graftvit.transfer.methods.drop_path import SharedDropPath
from graftvit.transfer.methods.dual import DualViT
from graftvit.transfer.methods.registry import find_method
from support.models.dense import gradient, relative_error
from support.models.dense import tiny as tiny_plain
from support.models.method_cases import CASES, Place, only_read
from support.models.pyramids import images, tiny
from support.models.stage_reference import block_outputs, dense_logits, expected, places, run
from torch import Tensor, nn

SIZE = (32, 24)
FINE, COARSE = (8, 6), (4, 3)
GRIDS = {
    "vit": [COARSE] * 2,
    **{kind: [FINE, COARSE, COARSE] for kind in ("pvt", "pvt1", "pvt_li")},
    **{kind: [FINE, FINE, COARSE, COARSE] for kind in ("svt", "pcpvt", "swin", "swinv2")},
}
NORM = Normalization((0.5,) * 3, (0.5,) * 3)
QUICK = {("svt", "svt"), ("swin", "swinv2"), ("swin", "vit"), ("vit", "pvt")}
RING = [kind for kind in GRIDS if kind not in ("pvt_li", "pcpvt")]
"""Each kind learns from itself, and those of the ring from the two before."""
OTHERS = {
    *((kind, kind) for kind in GRIDS),
    *((RING[number - step], kind) for number, kind in enumerate(RING) for step in (1, 2)),
}
PAIRS = [*sorted(QUICK), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in sorted(OTHERS - QUICK))]


@cache
def _model(kind: str, seed: int, more: tuple[tuple[str, Any], ...]) -> nn.Module:
    if kind == "vit":
        sizes: dict[str, Any] = {"embed_dim": 16, "num_heads": 2, "depth": 2, "num_classes": 3}
        return tiny_plain("vit", seed=seed, img_size=SIZE, **sizes)
    return tiny(kind, SIZE, seed=seed, **dict(more)).double()


def model(kind: str, seed: int = 1, **more: Any) -> nn.Module:
    return copy.deepcopy(_model(kind, seed, tuple(more.items())))


def rounds(allowed: dict[int, list[int]]) -> Iterator[list[tuple[int, int]]]:
    """Cover all pairs of layers by lists that name each student layer once."""
    for number in range(max((len(each) for each in allowed.values()), default=0)):
        yield [(theirs[number % len(theirs)], ours) for ours, theirs in allowed.items()]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_pair_equals_its_dense_reference_or_is_refused(teacher: str, student: str) -> None:
    theirs, ours, x = model(teacher, 1), model(student, 2), images(SIZE).double()
    places_t, places_s = places(theirs, GRIDS[teacher]), places(ours, GRIDS[student])
    for case in CASES:
        method = case.name
        if not find_method(method).uses_layers:
            check(method, [], (theirs, places_t), (ours, places_s), x)
            continue
        allowed: dict[int, list[int]] = {}
        for s, place_s in enumerate(places_s):
            for t, place_t in enumerate(places_t):
                if place_t.grid != place_s.grid or not case.fits(place_t, place_s):
                    with pytest.raises(TransferError, match=f"layer {s} of the student|layers {t}>{s} "):
                        DualViT(theirs, ours, method, layers=f"{t}>{s}")
                else:
                    allowed.setdefault(s, []).append(t)
        for pairs in rounds(allowed):
            check(method, pairs, (theirs, places_t), (ours, places_s), x)


@pytest.mark.parametrize("kind", ["pvt", "pvt_li", "svt"])
@pytest.mark.parametrize("method", ["copy", "distill_k"])
def test_a_teacher_is_cut_within_a_layer_with_reduced_keys(kind: str, method: str) -> None:
    layer = 1 if kind == "svt" else 0
    theirs, ours = model(kind, 1), model(kind, 2)
    of_both = places(theirs, GRIDS[kind])
    check(method, [(layer, layer)], (theirs, of_both), (ours, of_both), images(SIZE).double())


def check(
    method: str,
    pairs: list[tuple[int, int]],
    teacher: tuple[nn.Module, list[Place]],
    student: tuple[nn.Module, list[Place]],
    x: Tensor,
) -> None:
    """Compare logits, loss and gradients of a step with those of the reference."""
    twin = copy.deepcopy(student[0])
    logits, loss = expected(method, pairs, (copy.deepcopy(teacher[0]), teacher[1]), (twin, student[1]), x)
    (logits.square().mean() + loss).backward()
    own = copy.deepcopy(student[0])
    options: dict[str, Any] = {"layers": pairs} if pairs else {}
    options |= only_read(method, weight=1.0)
    options |= dict.fromkeys(("teacher_normalization", "student_normalization"), NORM)
    dual = DualViT(teacher[0], own, method, **options)
    out = dual(x)
    (out.logits.square().mean() + out.transfer_loss).backward()
    case = f"{method} {pairs}"
    assert relative_error(out.logits, logits) <= 1e-9, case
    assert float(out.transfer_loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-9), case
    assert relative_error(gradient(own), gradient(twin)) <= 1e-8, case


def x(batch: int = 2) -> Tensor:
    return images(SIZE, batch).double()


@pytest.mark.parametrize("method", ["copy", "distill", "block_output"])
@pytest.mark.parametrize("kind", ["pvt", "swin", "swinv2"])
def test_gradient_checkpointing_changes_no_gradient(kind: str, method: str) -> None:
    grads = []
    for checkpointing in (False, True):
        student: Any = model(kind, 2, drop_path_rate=0.0).train()
        student.set_grad_checkpointing(checkpointing)
        dual = DualViT(model(kind), student, method)
        steps = [dual(each) for each in (x(), 2 * x())]  # two steps before their backward passes
        for out in steps:
            (out.logits.square().mean() + out.transfer_loss).backward()
        grads.append(gradient(student))
    assert relative_error(*grads) < 1e-12
    assert grads[0].norm() > 0


@pytest.mark.parametrize("kind", ["pvt", "svt", "swin", "swinv2"])
def test_drop_paths_are_shared_image_by_image(kind: str) -> None:
    batch = 8  # as many as rows of the grid of Swin, which has one mask for an image all the same
    teacher = model(kind, drop_path_rate=0.6)
    dual = DualViT(teacher, copy.deepcopy(teacher), "block_output", share_drop_path=True).train()
    assert float(dual(x(batch)).transfer_loss.detach()) < 1e-20
    apart = DualViT(teacher, copy.deepcopy(teacher), "block_output").train()
    assert float(apart(x(batch)).transfer_loss.detach()) > 0.0
    drops = [each for each in dual.student.modules() if isinstance(each, SharedDropPath)]
    dual._tapes["teacher"].begin()
    for drop in drops:
        drop.draw(batch, x(batch))
        tokens = torch.ones(batch, batch, 6, 4) if "swin" in kind else torch.ones(batch, 48, 4)
        for image in drop(tokens):
            assert image.unique().numel() == 1
    dual.release()
    assert not any(isinstance(each, SharedDropPath) for each in dual.student.modules())


@pytest.mark.parametrize("kind", ["pvt", "svt", "swin", "swinv2"])
def test_a_teacher_ends_after_the_last_layer_that_is_needed(kind: str) -> None:
    teacher = model(kind)
    ran: list[str] = []
    for name, module in teacher.named_modules():
        if not name.endswith(("attn", "attn_drop", "softmax")):  # which no hook may be put on
            module.register_forward_hook(lambda _, __, ___, name=name: ran.append(name))
    DualViT(teacher, model(kind, 2), "distill_q", layers="0>0")(x())
    blocks = {"pvt": "stages", "svt": "blocks"}.get(kind, "layers")
    assert any(name.startswith(("patch_embed.", "patch_embeds.0.")) for name in ran)
    assert not any(name.startswith((f"{blocks}.1", "norm", "head", "pos_block")) for name in ran)
    assert not any(".mlp" in name or name.endswith("attn.proj") for name in ran)


def test_widths_are_projected_layer_by_layer() -> None:
    teacher, student = model("swin"), model("pvt", 2, embed_dims=(12, 24), depths=(2, 2))
    for method in ("block_output", "attention_output"):
        own = copy.deepcopy(student)
        dual = DualViT(teacher, own, method, weight=1.0, layers="stage1>stage1,stage2>stage2")
        shapes = {name: tuple(each.weight.shape) for name, each in dual.projectors.items()}
        assert shapes == {"layer00": (8, 12), "layer01": (8, 12), "layer02": (16, 24), "layer03": (16, 24)}
        loss = dual(x()).transfer_loss
        dual.release()
        if method == "block_output":
            theirs, ours = block_outputs(teacher, x()), block_outputs(own, x())
            expected = sum(
                F.mse_loss(dual.projectors[f"layer{i:02d}"](mine), wanted)
                for i, (wanted, mine) in enumerate(zip(theirs, ours, strict=True))
            )
            torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("loss", "temperature"), [("ce", 2.0), ("kl", 1.0), ("kl", 0.5)])
def test_windows_are_distilled_into_a_converted_layer_with_a_bias(loss: str, temperature: float) -> None:
    teacher = model("swin")
    student = convert(model("swin", 2), "0-1: softmax")
    seen: list[Heads] = []
    hooks = [
        blocks_of(student)[i].attn.operator.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        for i in (0, 1)
    ]
    dual = DualViT(
        teacher, student, "distill", layers="0>0,1>1", loss=loss, temperature=temperature, weight=1.0
    )
    found = dual(x()).transfer_loss
    for hook in hooks:
        hook.remove()
    _, layers = run(copy.deepcopy(teacher), x())
    expected = torch.zeros((), dtype=torch.float64)
    for layer, place, heads in zip(layers[:2], places(teacher, GRIDS["swin"])[:2], seen, strict=True):
        q, k = heads.qk()
        assert heads.bias is not None
        mine = (heads.scale * q @ k.transpose(-2, -1) + heads.bias) / temperature
        target = (dense_logits(layer, place, padded=False) / temperature).softmax(-1)
        value = -(target * mine.log_softmax(-1)).sum(-1).mean()
        if loss == "kl":
            value = value + torch.xlogy(target, target).sum(-1).mean()
        expected = expected + value * temperature**2
    torch.testing.assert_close(found, expected)
    found.backward()
    tables = [blocks_of(student)[i].attn.relative_position_bias_table.grad for i in (0, 1)]
    assert all(table is not None and table.abs().max() > 0 for table in tables)


@pytest.mark.parametrize("kind", ["svt", "swin", "swinv2", "pvt"])
def test_a_student_equal_to_its_teacher_has_no_loss(kind: str) -> None:
    teacher = model(kind)
    dual = DualViT(teacher, copy.deepcopy(teacher), "distill", loss="kl")
    assert abs(float(dual(x(1)).transfer_loss.detach())) < 1e-12


@pytest.mark.parametrize("heads", ["mean", "match", "0>0"])
def test_heads_within_windows_are_chosen(heads: str) -> None:
    teacher, student = model("swin", num_heads=(2, 4)), model("svt", 2)
    layers = "0>0" if heads != "mean" else "0>0,2>2"
    if heads == "match":
        dual = DualViT(teacher, student, "copy", layers=layers, heads=heads, calibration=x())
    else:
        dual = DualViT(teacher, student, "distill", layers=layers, heads=heads, weight=1.0)
    out = dual(x())
    assert torch.isfinite(out.transfer_loss)
    if heads != "mean":
        return
    _, theirs = run(copy.deepcopy(teacher), x())
    _, ours = run(model("svt", 2), x())
    expected = torch.zeros((), dtype=torch.float64)
    for index in (0, 2):
        place_t, place_s = places(teacher, GRIDS["swin"])[index], places(model("svt"), GRIDS["swin"])[index]
        target = dense_logits(theirs[index], place_t, padded=True).softmax(-1)
        target = target.unflatten(1, (-1, 2)).mean(2)
        mine = dense_logits(ours[index], place_s, padded=True).log_softmax(-1)
        expected = (
            expected - torch.where(target > 0, target * mine.masked_fill(target == 0, 0), 0).sum(-1).mean()
        )
    torch.testing.assert_close(out.transfer_loss, expected)


def test_a_batch_of_another_size_has_other_grids() -> None:
    teacher, student = model("pvt"), model("svt", 2)
    dual = DualViT(teacher, student, "attention_output", layers="0>1,1>2")
    other = images((48, 40)).double()
    assert dual.teacher_input(other).shape[-2:] == (48, 40)
    assert dual.teacher_input.grids(other, None) == (((12, 10), (6, 5)), ((12, 10), (6, 5)))
    assert torch.isfinite(dual(other).transfer_loss)
    with pytest.raises(TransferError, match="leave no token in a stage of the student"):
        dual(images((8, 4)).double())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "distill", "layers": "0>0", "rows": 0.5}, r"transfer.rows=0.5 is for maps of all tokens"),
        ({"method": "distill_q", "layers": "2>0", "interpolate_grid": True}, "only maps of all tokens"),
        (
            {"method": "distill", "layers": "stage5"},
            "of the student: there is no stage 5; the model has stages 1 to 2",
        ),
        ({"method": "copy", "layers": "0>1"}, r"within windows of 3x3 tokens and .* shifted by 1x1"),
    ],
)
def test_a_setting_that_does_not_fit_windows_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(TransferError, match=said):
        DualViT(model("swin"), model("swin", 2), **settings)


def test_other_depths_and_sizes_are_refused() -> None:
    student = model("pvt", 2, drop_path_rate=0.5, depths=(3, 1))
    with pytest.raises(TransferError, match="needs stages of the same depths"):
        DualViT(model("pvt"), student, "feature", share_drop_path=True)
    teacher, student = tiny("pvt", (64, 96)), tiny("pvt", (32, 32))
    with pytest.raises(TransferError, match=r"graftvit\.models\.resize\(model, \(height, width\)\)"):
        DualViT(teacher, student, "distill")
    resize(student, (64, 96))
    DualViT(teacher, student, "distill")


@pytest.mark.parametrize("method", ["copy", "copy_q", "copy_k", "copy_v"])
@pytest.mark.parametrize("kind", ["pvt", "pvt_li", "svt", "swin", "swinv2"])
def test_what_a_copied_layer_does_not_use_is_frozen(kind: str, method: str) -> None:
    student = model(kind, 2)
    dual = DualViT(model(kind), student, method)
    dual(x()).logits.square().mean().backward()
    waited_for = [
        name for name, each in student.named_parameters() if each.requires_grad and each.grad is None
    ]
    assert waited_for == []
    dual.release(bare=True)
    assert all(each.requires_grad for each in student.parameters())


@pytest.mark.parametrize("method", ["copy", "distill", "distill_q"])
@pytest.mark.parametrize("kind", ["svt", "swinv2"])
def test_half_precision_changes_little(kind: str, method: str) -> None:
    teacher, student = model(kind).float(), model(kind, 2).float()
    dual = DualViT(teacher, copy.deepcopy(student), method)
    exact = dual(x().float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = dual(x().float())
        (mixed.logits.float().square().mean() + mixed.transfer_loss).backward()
    half = DualViT(copy.deepcopy(teacher).to(torch.bfloat16), copy.deepcopy(student), method)(x().float())
    for out in (mixed, half):
        assert relative_error(out.logits, exact.logits) < 0.02
        torch.testing.assert_close(out.transfer_loss, exact.transfer_loss, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("kind", ["pvt", "svt", "swinv2"])
def test_copies_of_a_pair_are_complete(kind: str) -> None:
    dual = DualViT(model(kind), model(kind, 2), "distill")
    expected = dual(x())
    averaged = dual.with_student(model(kind, 2))
    for twin in (copy.deepcopy(dual), pickle.loads(pickle.dumps(dual)), averaged):
        torch.testing.assert_close(twin(x()).transfer_loss, expected.transfer_loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "part"),
    [
        *((kind, "step") for kind in ("pvt", "svt", "swin", "swinv2")),
        *((kind, "teacher of 0>0") for kind in ("pvt", "swin")),
        *((kind, "teacher of stage2") for kind in ("svt", "swinv2")),
    ],
)
def test_a_step_or_its_teacher_is_one_compiled_graph(kind: str, part: str) -> None:
    torch.compiler.reset()
    layers = "all" if part == "step" else part.split()[-1]
    duals = [DualViT(model(kind), model(kind, 2), "distill", layers=layers) for _ in range(2)]
    (duals[0] if part == "step" else duals[0].teacher_part).compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(*(dual(x()).transfer_loss for dual in duals))


def test_a_layer_without_attention_learns_from_a_block_alone() -> None:
    converted = convert(model("swin", 2), "stage1: none; 2: linear", without=["bias"])
    student = copy.deepcopy(converted)
    dual = DualViT(model("swin"), student, "block_output", weight=1.0)
    theirs, ours = block_outputs(model("swin"), x()), block_outputs(converted, x())
    expected = sum(F.mse_loss(mine, wanted) for wanted, mine in zip(theirs, ours, strict=True))
    torch.testing.assert_close(dual(x()).transfer_loss, expected)
    dual.release()
    dual = DualViT(model("swin"), student, "attention_output", layers="stage2")
    assert torch.isfinite(dual(x()).transfer_loss)
    dual.release()
    with pytest.raises(
        TransferError, match=r"layer 0 of the student .* that of the student has no attention"
    ):
        DualViT(model("swin"), student, "attention_output")
    with pytest.raises(TransferError, match="layer 2 of the student has linear in place of softmax"):
        DualViT(model("swin"), student, "distill_q", layers="stage2")
