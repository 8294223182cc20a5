"""Teachers and students that take images of several sizes: the grids of each batch against the dense reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graftvit.models.copied import CopiedTeacher, copy_attention
from graftvit.models.copying.teacher_view import Normalization
from graftvit.models.errors import TransferError
from graftvit.transfer.methods.dual import DualViT
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models.dense import gradient, images, relative_error, tiny
from support.models.method_cases import only_read
from support.models.pair_reference import Pair, check_step
from torch import Tensor, nn

HALF = Normalization((0.5,) * 3, (0.5,) * 3)
SAME = {"teacher_normalization": HALF, "student_normalization": HALF}
FREE = {"dynamic_img_size": True}


def agree(dual: DualViT, twin: nn.Module, x: Tensor) -> None:
    """Compare with the reference; timm resamples position tables in float32, also on the way back."""
    method, depth = dual.config.method, len(twin.blocks)
    heads = {head: [head] for head in range(4)} if method in ("copy", "distill") else {}
    layers = () if method in ("feature", "logits") else tuple((layer, layer) for layer in range(depth))
    check_step(Pair(method, layers, heads, {"weight": 1.0}), dual.teacher, dual, twin, x, 1e-8, 1e-7)


def pair(method: str, theirs: Any, ours: Any, **options: Any) -> tuple[DualViT, nn.Module]:
    teacher, student = tiny(seed=1, **theirs), tiny(seed=2, **ours)
    twin = copy.deepcopy(student)
    return DualViT(teacher, student, method, **only_read(method, weight=1.0), **SAME, **options), twin


DINOV3 = {"family": "dinov3", "img_size": (64, 96), "patch_size": 16}


@pytest.mark.parametrize(
    "theirs", [DINOV3, {**FREE, "img_size": (24, 36), "patch_size": 6}], ids=["eva", "vit"]
)
@pytest.mark.parametrize("method", ["copy", "distill", "feature", "logits"])
def test_a_teacher_that_takes_any_size_is_shown_its_own(method: str, theirs: Any) -> None:
    dual, twin = pair(method, theirs, {})
    agree(dual, twin, images(1))
    assert f"resized to {theirs['img_size']}" in dual.describe()


@pytest.mark.parametrize("free", [{}, FREE], ids=["fixed", "free"])
def test_interpolation_between_grids_of_equally_many_patches(free: Any) -> None:
    theirs, ours = {"img_size": (24, 32), **free}, {"img_size": (32, 24)}
    dual, twin = pair("distill", theirs, ours, interpolate_grid=True)
    agree(dual, twin, images(size=(32, 24)))


@pytest.mark.parametrize("method", ["copy", "distill", "attention_output", "feature"])
def test_a_teacher_that_takes_any_size_follows_the_batch(method: str) -> None:
    dual, twin = pair(method, {**FREE, **DINOV3}, FREE)
    for size in ((32, 48), (48, 24), (16, 40), (32, 48)):
        agree(dual, twin, images(1, size=size))
        assert dual.teacher_input(images(1, size=size)).shape[2:] == (size[0] * 2, size[1] * 2)


def test_a_batch_of_another_size_beside_a_teacher_of_one() -> None:
    dual, twin = pair("feature", {}, FREE)
    agree(dual, twin, images(size=(48, 48)))
    for method in ("copy", "distill", "attention_output", "block_output"):
        dual, _ = pair(method, {}, FREE)
        for size in ((48, 48), (48, 32)):  # the latter is as many patches
            with pytest.raises(TransferError, match=r"48x\d\d, the teacher's patch grid is 4x6 .* 6x[46]"):
                dual(images(size=size))
        assert bool(dual(images()).logits.isfinite().all())
    dual, twin = pair("distill", {}, FREE, interpolate_grid=True)
    for size in ((48, 32), (32, 48), (16, 64)):
        agree(dual, twin, images(size=size))
    dual, _ = pair("distill", {"family": "beit"}, FREE, interpolate_grid=True)
    with pytest.raises(TransferError, match="relative position bias"):
        dual(images(size=(48, 32)))


FAMILIES = [("vit", FREE), ("vit", {}), ("dinov3", {}), ("eva02", {}), ("beit", {}), ("vit_no_prefix", FREE)]
SIDES = st.tuples(st.integers(1, 4), st.integers(1, 4))


def times(grid: tuple[int, int], patch: int) -> tuple[int, int]:
    return grid[0] * patch, grid[1] * patch


@settings(max_examples=25)
@given(st.data())
def test_random_pairs(data: st.DataObject) -> None:
    (theirs, free), (ours, student_free) = (data.draw(st.sampled_from(FAMILIES)) for _ in range(2))
    patches, grid = data.draw(st.tuples(st.integers(4, 9), st.integers(4, 9))), data.draw(SIDES)
    method = data.draw(st.sampled_from(["copy", "distill", "attention_output", "feature"]))
    interpolate = method == "distill" and theirs != "beit" and data.draw(st.booleans())
    teacher_grid = data.draw(SIDES) if interpolate or method == "feature" else grid
    sizes, batch = (times(teacher_grid, patches[0]), times(grid, patches[1])), data.draw(st.integers(1, 2))
    dual, twin = pair(
        method,
        {"family": theirs, "img_size": sizes[0], "patch_size": patches[0], "depth": 2, **free},
        {"family": ours, "img_size": sizes[1], "patch_size": patches[1], "depth": 2, **student_free},
        **({"interpolate_grid": True} if interpolate else {}),
    )
    agree(dual, twin, images(batch, size=sizes[1]))
    if not student_free and ours != "dinov3":
        return
    other = data.draw(SIDES)
    x = images(batch, seed=1, size=times(other, patches[1]))
    if free or theirs == "dinov3":  # the teacher goes along, to as many more patches
        scaled = [max(1, int(t * n / s + 0.5)) for t, n, s in zip(teacher_grid, other, grid, strict=True)]
        follows = (scaled[0], scaled[1])
    else:
        follows = teacher_grid
    if follows == other or interpolate or method == "feature":
        agree(dual, twin, x)
    else:
        with pytest.raises(TransferError, match="patch grid"):
            dual(x)


@pytest.mark.parametrize("method", ["copy", "distill"])
def test_a_backward_pass_has_the_grids_of_its_own_forward_pass(method: str) -> None:
    options = {"interpolate_grid": True} if method == "distill" else {}
    dual, twin = pair(method, {} if options else {**FREE, **DINOV3}, FREE, **options)
    dual.student.set_grad_checkpointing(True)
    batches = [images(size=size) for size in ((32, 48), (48, 32), (24, 64))]
    losses = [out.logits.square().mean() + out.transfer_loss for out in map(dual.train(), batches)]
    for loss in losses:
        loss.backward()
    grads = []
    for x in batches:
        agree(
            single := DualViT(
                dual.teacher, copy.deepcopy(twin), method, **only_read(method, weight=1.0), **SAME, **options
            ),
            twin,
            x,
        )
        grads.append(gradient(single.student))
    assert relative_error(gradient(dual.student), torch.stack(grads).sum(0)) < 1e-7


def test_heads_are_matched_in_the_grids_of_the_batch() -> None:
    x = images(size=(48, 24))
    student, options = tiny(seed=2, **FREE), {"heads": "mean", "interpolate_grid": True}
    teacher = tiny(seed=1, num_heads=8)
    assert DualViT(teacher, copy.deepcopy(student), **options)(x).transfer_loss.isfinite()
    found = DualViT(teacher, student, heads="match", interpolate_grid=True, calibration=x)
    assert found(x).transfer_loss.isfinite()


@pytest.mark.parametrize(
    ("theirs", "ours", "size", "message"),
    [
        ({}, {}, (48, 32), r"images are 48x32 and the student takes 32x48 alone; .*student\.img_size"),
        ({}, FREE, (30, 48), r"30x48 are not whole patches of 8x8, as the student .* such as 32x48"),
        ({}, FREE, (4, 48), r"images of 4x48 are not whole patches"),
    ],
)
@pytest.mark.parametrize("method", ["distill", "copy", "logits"])
def test_batches_that_a_model_does_not_take(
    theirs: Any, ours: Any, size: tuple[int, int], message: str, method: str
) -> None:
    dual, _ = pair(method, theirs, ours)
    with pytest.raises(TransferError, match=message):
        dual(images(size=size))


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({**FREE, "img_size": (30, 48)}, {}, r"teacher needs them: set teacher\.img_size .* such as 32x48"),
        ({}, {**FREE, "img_size": (30, 48)}, r"student needs them: set student\.img_size"),
        ({}, {"patch_drop_rate": 0.2}, r"student\.model_args\.patch_drop_rate must be 0"),
    ],
)
def test_models_that_cannot_go_together(theirs: Any, ours: Any, message: str) -> None:
    with pytest.raises(TransferError, match=message):
        pair("distill", theirs, ours)


def alone(theirs: Any, ours: Any) -> tuple[DualViT, nn.Module]:
    """A pair that copies, and the student with its part of the teacher as one model."""
    dual, _ = pair("copy", theirs, ours)
    copying = dual.copying(CopiedTeacher("vit_tiny_patch16_224", {}, HALF))
    return dual.eval(), copy_attention(tiny(seed=2, **ours), tiny(seed=1, **theirs), copying).eval()


@torch.no_grad()
def test_a_copied_model_takes_what_its_pair_takes() -> None:
    dual, model = alone({**FREE, **DINOV3}, FREE)
    for size in ((32, 48), (48, 24)):
        assert torch.equal(model(images(size=size)), dual.predict(images(size=size)))
    dual, model = alone({}, FREE)
    for forward in (dual.predict, model):
        with pytest.raises(TransferError, match="for images of 48x32, the teacher's patch grid is 4x6"):
            forward(images(size=(48, 32)))
    assert torch.equal(model(images()), dual.predict(images()))
