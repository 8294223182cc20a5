"""Teachers and students that take images of several sizes: the grids of each batch against the dense reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graftvit.models.copied import CopiedTeacher, copy_attention
from graftvit.models.copying.teacher_view import Normalization
from graftvit.models.errors import TransferError
from graftvit.transfer.methods.dual import DualViT
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models.dense import cross_entropy, gradient, images, relative_error, run, tiny
from torch import Tensor, nn

HALF = Normalization((0.5,) * 3, (0.5,) * 3)
SAME = {"teacher_normalization": HALF, "student_normalization": HALF}
FREE = {"dynamic_img_size": True}


def shown(x: Tensor, size: tuple[int, int]) -> Tensor:
    """As the teacher sees it."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bicubic", antialias=True)


def moved(logits: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Attention logits (B, H, N, N) with rows and columns interpolated to another grid, prefix tokens kept."""
    if old == new:
        return logits
    for _ in range(2):
        batch, heads, _, other = logits.shape
        patches = logits[:, :, prefix:].transpose(2, 3).reshape(batch, heads * other, *old)
        patches = F.interpolate(patches, new, mode="bilinear", align_corners=False)
        patches = patches.reshape(batch, heads, other, -1).transpose(2, 3)
        logits = torch.cat([logits[:, :, :prefix], patches], 2).transpose(2, 3)
    return logits


def reference(
    method: str, teacher: nn.Module, student: nn.Module, x: Tensor, size: tuple[int, int], grids: Any = None
) -> tuple[Tensor, Tensor]:
    """Logits and loss, with the teacher on images of `size`, and its logits interpolated between `grids`."""
    prefix = (teacher.num_prefix_tokens, student.num_prefix_tokens)
    with torch.no_grad():
        target, t = run(teacher, shown(x, size))

    def shared(side: int, length: int) -> list[int]:
        """The prefix tokens that both have, and the patches."""
        return [*range(min(prefix)), *range(prefix[side], length)]

    def maps(index: int) -> Tensor:
        logits = t[index].logits
        logits = logits if grids is None else moved(logits, prefix[0], *grids)
        chosen = shared(0, logits.shape[-1])
        return logits[:, :, chosen][..., chosen].softmax(-1).detach()

    if method == "copy":

        def override(index: int, own: Any) -> Tensor:
            chosen = shared(1, own.v.shape[2])
            out = own.out.clone()
            out[:, :, chosen] = maps(index) @ own.v[:, :, chosen]
            return out

        logits, _ = run(student, x, override)
        return logits, logits.new_zeros(())
    logits, s = run(student, x)
    if method == "distill":
        loss = logits.new_zeros(())
        for index, layer in enumerate(s):
            chosen = shared(1, layer.logits.shape[-1])
            loss = loss + cross_entropy(maps(index), layer.logits[:, :, chosen][..., chosen])
        return logits, loss
    if method == "attention_output":
        outs = [
            (a.out[:, :, shared(0, a.out.shape[2])], b.out[:, :, shared(1, b.out.shape[2])])
            for a, b in zip(t, s, strict=True)
        ]
        return logits, sum(F.mse_loss(ours, theirs) for theirs, ours in outs)
    if method == "feature":
        with torch.no_grad():
            theirs = teacher.forward_head(teacher.forward_features(shown(x, size)), pre_logits=True)
        ours = student.forward_head(student.forward_features(x), pre_logits=True)
        return logits, 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()
    assert method == "logits"
    loss = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
    return logits, loss


def agree(dual: DualViT, twin: nn.Module, x: Tensor, size: tuple[int, int], grids: Any = None) -> None:
    dual.student.zero_grad()
    twin.zero_grad()
    logits, loss = reference(dual.config.method, dual.teacher, twin, x, size, grids)
    (logits.square().mean() + loss).backward()
    out = dual(x)
    (out.logits.square().mean() + out.transfer_loss).backward()
    assert relative_error(out.logits, logits) < 1e-9
    assert float(out.transfer_loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-8, abs=1e-12)
    # Not smaller: timm resamples position tables in float32, also on the way back.
    assert relative_error(gradient(dual.student), gradient(twin)) < 1e-7


def pair(method: str, theirs: Any, ours: Any, **options: Any) -> tuple[DualViT, nn.Module]:
    teacher, student = tiny(seed=1, **theirs), tiny(seed=2, **ours)
    twin = copy.deepcopy(student)
    return DualViT(teacher, student, method, weight=1.0, **SAME, **options), twin


DINOV3 = {"family": "dinov3", "img_size": (64, 96), "patch_size": 16}


@pytest.mark.parametrize(
    "theirs", [DINOV3, {**FREE, "img_size": (24, 36), "patch_size": 6}], ids=["eva", "vit"]
)
@pytest.mark.parametrize("method", ["copy", "distill", "feature", "logits"])
def test_a_teacher_that_takes_any_size_is_shown_its_own(method: str, theirs: Any) -> None:
    dual, twin = pair(method, theirs, {})
    agree(dual, twin, images(1), theirs["img_size"])
    assert f"resized to {theirs['img_size']}" in dual.describe()


@pytest.mark.parametrize("free", [{}, FREE], ids=["fixed", "free"])
def test_interpolation_between_grids_of_equally_many_patches(free: Any) -> None:
    dual, twin = pair(
        "distill", {"img_size": (24, 32), **free}, {"img_size": (32, 24)}, interpolate_grid=True
    )
    agree(dual, twin, images(size=(32, 24)), (24, 32), ((3, 4), (4, 3)))


@pytest.mark.parametrize("method", ["copy", "distill", "attention_output", "feature"])
def test_a_teacher_that_takes_any_size_follows_the_batch(method: str) -> None:
    dual, twin = pair(method, {**FREE, **DINOV3}, FREE)
    for size in ((32, 48), (48, 24), (16, 40), (32, 48)):
        teacher_size = (size[0] * 2, size[1] * 2)
        agree(dual, twin, images(1, size=size), teacher_size)


def test_a_batch_of_another_size_beside_a_teacher_of_one() -> None:
    dual, twin = pair("feature", {}, FREE)
    agree(dual, twin, images(size=(48, 48)), (32, 48))
    for method in ("copy", "distill", "attention_output", "block_output"):
        dual, _ = pair(method, {}, FREE)
        for size in ((48, 48), (48, 32)):  # the latter is as many patches
            with pytest.raises(
                TransferError, match=r"images of 48x\d\d, the teacher's patch grid is 4x6 .* 6x[46]"
            ):
                dual(images(size=size))
        assert bool(dual(images()).logits.isfinite().all())
    dual, twin = pair("distill", {}, FREE, interpolate_grid=True)
    for size in ((48, 32), (32, 48), (16, 64)):
        agree(dual, twin, images(size=size), (32, 48), ((4, 6), (size[0] // 8, size[1] // 8)))
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
    agree(dual, twin, images(batch, size=sizes[1]), sizes[0], (teacher_grid, grid) if interpolate else None)
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
        agree(dual, twin, x, times(follows, patches[0]), (follows, other) if interpolate else None)
    else:
        with pytest.raises(TransferError, match="patch grid"):
            dual(x)


@pytest.mark.parametrize("method", ["copy", "distill"])
def test_a_backward_pass_has_the_grids_of_its_own_forward_pass(method: str) -> None:
    options = {"interpolate_grid": True} if method == "distill" else {}
    theirs = {} if method == "distill" else {**FREE, **DINOV3}
    dual, twin = pair(method, theirs, FREE, **options)
    dual.student.set_grad_checkpointing(True)
    sizes = [(32, 48), (48, 32), (24, 64)]
    outs = [dual.train()(images(size=size)) for size in sizes]
    for out in outs:
        (out.logits.square().mean() + out.transfer_loss).backward()
    for size in sizes:
        grids = ((4, 6), (size[0] // 8, size[1] // 8)) if options else None
        teacher_size = (32, 48) if options else (size[0] * 2, size[1] * 2)
        logits, loss = reference(method, dual.teacher, twin, images(size=size), teacher_size, grids)
        (logits.square().mean() + loss).backward()
    assert relative_error(gradient(dual.student), gradient(twin)) < 1e-8


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
        (
            {},
            FREE,
            (30, 48),
            r"images of 30x48 are not whole patches of 8x8, as the student .* such as 32x48",
        ),
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
