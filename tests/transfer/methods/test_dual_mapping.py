"""Unequal depth, heads, width, tokens and grids against the dense reference."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from graftvit.models.copying.teacher_view import Normalization
from graftvit.models.errors import TransferError
from graftvit.transfer.methods.dual import DualViT
from support.models.dense import cross_entropy, gradient, images, relative_error, run, tiny
from torch import Tensor, nn

TOLERANCE = 1e-9
SAME = {
    "teacher_normalization": Normalization((0.5,) * 3, (0.5,) * 3),
    "student_normalization": Normalization((0.5,) * 3, (0.5,) * 3),
}


def agree(dual: DualViT, twin: nn.Module, logits: Tensor, loss: Tensor, x: Tensor) -> None:
    (logits.square().mean() + loss).backward()
    out = dual(x)
    (out.logits.square().mean() + out.transfer_loss).backward()
    assert relative_error(out.logits, logits) < TOLERANCE
    assert float(out.transfer_loss.detach()) == pytest.approx(float(loss.detach()), rel=TOLERANCE)
    assert relative_error(gradient(dual.student), gradient(twin)) < TOLERANCE


def test_layers_by_pair_and_unequal_depth() -> None:
    teacher, student = tiny(seed=1, depth=4), tiny(seed=2)
    twin, x = copy.deepcopy(student), images()
    (logits, s), (_, t) = run(twin, x), run(teacher, x)
    loss = cross_entropy(t[3].map.detach(), s[0].logits) + cross_entropy(t[1].map.detach(), s[2].logits)
    agree(DualViT(teacher, student, layers=[(3, 0), (1, 2)], weight=1.0), twin, logits, loss, x)


def test_official_end_layer_is_the_first_eighteen_of_twenty_four() -> None:
    teacher, student = tiny(seed=1, depth=24), tiny(seed=2, depth=24)
    dual = DualViT(teacher, student, layers=":-6")
    assert sorted(dual(images()).parts) == [f"layer{i:02d}" for i in range(18)]


@pytest.mark.parametrize("method", ["distill", "copy"])
@pytest.mark.parametrize(
    ("heads", "teacher_heads"), [("mean", 8), ("mean", 2), ("0>1,5>1,2>3", 8), ([0, 3], 4)]
)
def test_heads(method: str, heads: object, teacher_heads: int) -> None:
    teacher, student = tiny(seed=1, num_heads=teacher_heads), tiny(seed=2)
    twin, x = copy.deepcopy(student), images()
    _, t = run(teacher, x)
    targets = {
        "mean8": {h: [2 * h, 2 * h + 1] for h in range(4)},
        "mean2": {h: [h // 2] for h in range(4)},
        "0>1,5>1,2>38": {1: [0, 5], 3: [2]},
        "[0, 3]4": {0: [0], 3: [3]},
    }[f"{heads}{teacher_heads}"]
    mean = [{h: layer.map[:, group].mean(1).detach() for h, group in targets.items()} for layer in t]
    if method == "copy":

        def override(index: int, own: object) -> Tensor:
            maps = torch.stack([mean[index].get(h, own.map[:, h]) for h in range(4)], 1)
            return maps @ own.v

        logits, _ = run(twin, x, override)
        loss = logits.new_zeros(())
    else:
        logits, s = run(twin, x)
        loss = sum(
            torch.stack([cross_entropy(m, layer.logits[:, h]) for h, m in maps.items()]).mean()
            for maps, layer in zip(mean, s, strict=True)
        )
    agree(DualViT(teacher, student, method, heads=heads, weight=1.0), twin, logits, loss, x)


@pytest.mark.parametrize("method", ["copy_q", "copy_k", "copy_v"])
def test_copied_projection_of_some_heads(method: str) -> None:
    teacher, student = tiny(seed=1), tiny(seed=2)
    twin, x = copy.deepcopy(student), images()
    _, t = run(teacher, x)
    part = method[-1]

    def override(index: int, own: object) -> Tensor:
        mixed = getattr(own, part).clone()
        mixed[:, [0, 3]] = getattr(t[index], part)[:, [0, 3]].detach()
        q, k, v = (mixed if name == part else getattr(own, name) for name in "qkv")
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v

    logits, _ = run(twin, x, override)
    agree(DualViT(teacher, student, method, heads=[0, 3]), twin, logits, logits.new_zeros(()), x)


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
    ("teacher_family", "student_family"),
    [("dinov2_registers", "vit"), ("vit", "vit_no_prefix"), ("vit", "deit_distilled")],
)
def test_prefix_tokens_are_matched_by_kind(teacher_family: str, student_family: str) -> None:
    teacher, student = tiny(teacher_family, seed=1), tiny(student_family, seed=2)
    twin, x = copy.deepcopy(student), images()
    (logits, s), (_, t) = run(twin, x), run(teacher, x)
    has_class = student_family != "vit_no_prefix"
    keep_t = [*([0] if has_class else []), *range(teacher.num_prefix_tokens, t[0].q.shape[2])]
    keep_s = [*([0] if has_class else []), *range(student.num_prefix_tokens, s[0].q.shape[2])]
    loss = sum(
        cross_entropy(
            a.logits[:, :, keep_t][..., keep_t].softmax(-1).detach(), b.logits[:, :, keep_s][..., keep_s]
        )
        for a, b in zip(t, s, strict=True)
    )
    agree(DualViT(teacher, student, weight=1.0, **SAME), twin, logits, loss, x)


@pytest.mark.parametrize("student_family", ["vit_no_prefix", "deit_distilled"])
def test_copy_leaves_tokens_that_the_teacher_lacks_to_the_student(student_family: str) -> None:
    teacher, student = tiny("vit", seed=1), tiny(student_family, seed=2)
    twin, x = copy.deepcopy(student), images()
    _, t = run(teacher, x)
    prefix = student.num_prefix_tokens
    keep_t = [0, *range(1, 25)] if prefix else list(range(1, 25))
    keep_s = [0, *range(2, 26)] if prefix else list(range(24))

    def override(index: int, own: object) -> Tensor:
        target = t[index].logits[:, :, keep_t][..., keep_t].softmax(-1).detach()
        out = own.out.clone()
        out[:, :, keep_s] = target @ own.v[:, :, keep_s]
        return out

    logits, _ = run(twin, x, override)
    agree(DualViT(teacher, student, "copy", **SAME), twin, logits, logits.new_zeros(()), x)


def test_grids_are_interpolated_only_when_asked() -> None:
    teacher, student = tiny(seed=1, img_size=(64, 32)), tiny(seed=2)
    with pytest.raises(TransferError, match="interpolate_grid"):
        DualViT(teacher, student)
    with pytest.raises(TransferError, match="8x4"):
        DualViT(teacher, student, "copy", interpolate_grid=True)
    twin, x = copy.deepcopy(student), images()
    teacher_x = F.interpolate(x, (64, 32), mode="bicubic", antialias=True)
    (logits, s), (_, t) = run(twin, x), run(teacher, teacher_x)
    loss = torch.zeros((), dtype=torch.float64)
    for a, b in zip(t, s, strict=True):
        moved = interpolated(interpolated(a.logits).transpose(-2, -1)).transpose(-2, -1)
        loss = loss + cross_entropy(moved.softmax(-1).detach(), b.logits)
    agree(DualViT(teacher, student, interpolate_grid=True, weight=1.0), twin, logits, loss, x)


def interpolated(logits: Tensor) -> Tensor:
    """Bilinear interpolation of the rows from an 8 x 4 to a 4 x 6 grid, the class row kept."""
    batch, heads, _, keys = logits.shape
    rows = logits[:, :, 1:].permute(0, 1, 3, 2).reshape(batch, heads * keys, 8, 4)
    rows = F.interpolate(rows, (4, 6), mode="bilinear", align_corners=False)
    return torch.cat([logits[:, :, :1], rows.reshape(batch, heads, keys, 24).transpose(2, 3)], 2)


@pytest.mark.parametrize(
    "method", ["distill", "copy", "distill_q", "attention_output", "block_output", "feature"]
)
def test_unequal_width(method: str) -> None:
    teacher, student = tiny(seed=1, embed_dim=48), tiny(seed=2)
    dual = DualViT(teacher, student, method).double()
    out = dual(images())
    (out.logits.sum() + out.transfer_loss).backward()
    projected = method not in ("distill", "copy")
    assert bool(len(dual.projectors)) == projected
    assert all(p.grad is not None and bool(p.grad.any()) for p in dual.projectors.parameters())
    assert gradient(student).isfinite().all()


def test_copy_between_unequal_widths_is_the_dense_copy() -> None:
    for width in (16, 48):
        teacher, student = tiny(seed=1, embed_dim=width), tiny(seed=2)
        twin, x = copy.deepcopy(student), images()
        _, t = run(teacher, x)
        logits, _ = run(twin, x, lambda i, own, t=t: t[i].map.detach() @ own.v)
        agree(DualViT(teacher, student, "copy"), twin, logits, logits.new_zeros(()), x)


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


@pytest.mark.parametrize("method", ["distill_q", "attention_output"])
def test_chosen_heads_of_models_of_unequal_width(method: str) -> None:
    teacher, student = tiny(seed=1, embed_dim=64, num_heads=8), tiny(seed=2)
    twin, x = copy.deepcopy(student), images()
    (logits, s), (_, t) = run(twin, x), run(teacher, x)
    name = "q" if method == "distill_q" else "out"
    pairs = [(getattr(b, name)[:, [0, 2]], getattr(a, name)[:, [7, 1]]) for a, b in zip(t, s, strict=True)]
    loss = sum(F.mse_loss(mine, theirs.detach()) for mine, theirs in pairs)
    agree(DualViT(teacher, student, method, heads="7>0,1>2", weight=1.0), twin, logits, loss, x)


def test_a_bias_that_other_heads_still_use_is_trained() -> None:
    teacher, student = tiny(seed=1), tiny("beit_shared", seed=2)
    dual = DualViT(teacher, student, "copy", heads=[0, 3])
    dual(images()).logits.square().sum().backward()
    assert student.rel_pos_bias.relative_position_bias_table.grad.any()
    dual.release(bare=True)
    DualViT(teacher, student, "copy")
    assert not student.rel_pos_bias.relative_position_bias_table.requires_grad
