"""Files of self-supervised ViTs (DINO, DINOv2, DINOv3, iBOT, MoCo-v3) give their papers' features."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from support.files import source_files as files
from support.files.source_checks import IMAGENET, Load, doubled, loader, plain, same_features
from support.files.source_files import DEPTH, HEADS, SIDE, Tensors
from support.models import reference_vit as reference
from torch import Tensor


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return loader(tmp_path)


@pytest.mark.parametrize("part", ["", "#teacher", "#student"])
def test_dino_training_file(load: Load, part: str) -> None:
    networks = {name: files.plain() for name in ("student", "teacher")}
    tree = {
        name: {f"{wrap}backbone.{key}": t for key, t in networks[name].items()}
        | {f"{wrap}{key}": t for key, t in files.dino_head("head").items()}
        for name, wrap in (("student", "module."), ("teacher", ""))
    }
    center = {"center": torch.zeros(1, 8)}
    teacher = load({**tree, "epoch": 3, "dino_loss": center}, "vit_small_patch16_224", part)
    assert same_features(teacher, plain(networks[part.removeprefix("#") or "teacher"]))
    assert teacher.mean == IMAGENET
    assert set(teacher.report.unexpected) == set(files.dino_head("head"))
    assert set(teacher.report.unexpected.values()) == {"the projection head of self-distillation"}


def test_a_backbone_alone_takes_imagenets_statistics_and_says_so(load: Load) -> None:
    tensors = files.plain()
    for tree in (
        tensors,
        {"state_dict": tensors},
        {"state_dict": {f"module.{k}": t for k, t in tensors.items()}},
    ):
        teacher = load(tree, "vit_small_patch16_224")
        assert same_features(teacher, plain(tensors))
        assert teacher.mean == IMAGENET
        assert "ImageNet's assumed" in teacher.report.summary()


def test_ibot_with_and_without_its_mask_token(load: Load) -> None:
    tensors = files.plain()
    masked = {**tensors, "masked_embed": files.random(1, 16)}
    head = files.dino_head("head") | {"head.last_layer2.weight_g": files.random(8, 1)}
    tree = {
        "teacher": {f"backbone.{key}": t for key, t in masked.items()} | head,
        "student": {"backbone.x": head["head.mlp.0.bias"]},
    }
    teacher = load(tree, "vit_small_patch16_224")
    assert same_features(teacher, plain(tensors))
    assert teacher.report.unexpected["masked_embed"] == "the mask token of masked image modelling"
    assert set(teacher.report.unexpected) == {"masked_embed", *head}
    assert same_features(load({"state_dict": masked}, "vit_small_patch16_224"), plain(tensors))


@pytest.mark.parametrize("part", ["", "#student", "#ema"])
def test_moco(load: Load, part: str) -> None:
    encoders = {name: files.plain() for name in ("base", "momentum")}
    tensors = {f"module.predictor.{i}.weight": files.random(8, 8) for i in (0, 3)}
    for name, encoder in encoders.items():
        whole = {**encoder, **files.moco_head("head")}
        tensors |= {f"module.{name}_encoder.{key}": t for key, t in whole.items()}
    # Its `arch` is the source's own word, which timm does not know.
    tree = {"epoch": 1, "arch": "vit_small", "state_dict": tensors, "optimizer": {}}
    teacher = load(tree, "vit_small_patch16_224", part)
    assert same_features(teacher, plain(encoders["momentum" if part == "#ema" else "base"]))
    assert teacher.mean == IMAGENET
    left = teacher.report.unexpected
    assert left["head.0.weight"] == "the projection head of MoCo"
    assert left["predictor.0.weight"].startswith("outside of ")
    expected = {key.removeprefix("module.") for key in tensors} | set(files.moco_head("head"))
    assert set(left) < expected


def sines(side: int, width: int, *, rows_first: bool) -> Tensor:
    """Fixed positions in two dimensions: MoCo-v3's begin with the rows, MAE's with the columns."""
    position = torch.zeros(1, 1 + side * side, width)
    quarter = width // 4
    for i in range(side * side):
        row, column = divmod(i, side)
        for half, place in enumerate((row, column) if rows_first else (column, row)):
            for j in range(quarter):
                angle = place / 10000 ** (j / quarter)
                position[0, 1 + i, 2 * half * quarter + j] = math.sin(angle)
                position[0, 1 + i, (2 * half + 1) * quarter + j] = math.cos(angle)
    return position


@pytest.mark.parametrize(("rows_first", "heads"), [(True, 12), (False, 6)])
@pytest.mark.parametrize("converted", [True, False])
def test_the_small_moco_has_twelve_heads_which_no_shape_says(
    load: Load, rows_first: bool, heads: int, converted: bool
) -> None:
    with torch.random.fork_rng():
        model = timm.create_model("vit_small_patch16_224", img_size=64, depth=1, num_classes=0)
    tensors = dict(model.state_dict()) | {"pos_embed": sines(4, 384, rows_first=rows_first)}
    if not converted and rows_first:
        tensors = {f"base_encoder.{key}": t for key, t in (tensors | files.moco_head("head")).items()}
    torch_file = {"model" if converted else "state_dict": tensors}
    teacher = load(
        torch_file, "vit_small_patch16_224", embed_dim=None, depth=1, num_heads=None, patch_size=None
    )
    assert teacher.model.blocks[0].attn.num_heads == heads
    assert ("heads: 12, as MoCo-v3's small ViT has" in teacher.report.summary()) == (heads == 12)


@pytest.mark.parametrize("registers", [0, 4, 2])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2(load: Load, registers: int, gated: bool, chunked: bool) -> None:
    blocks = ["blocks.0.0.", "blocks.1.1."] if chunked else ["blocks.0.", "blocks.1."]
    tensors = files.dinov2(blocks, registers=registers, gated=gated)
    t = doubled(tensors)
    name = ("vit_giant_patch14" if gated else "vit_base_patch14") + (
        "_reg4_dinov2" if registers else "_dinov2"
    )
    arguments = {"reg_tokens": registers} if registers else {}
    teacher = load(tensors, name, **arguments, **({"mlp_ratio": 4} if gated else {}))
    assert same_features(teacher, lambda images: reference.dinov2(t, images, HEADS, blocks, gated=gated))
    assert teacher.mean == IMAGENET
    assert set(teacher.report.unexpected) == {"mask_token"}


def test_dinov2_training_file(load: Load) -> None:
    blocks = ["blocks.0.0.", "blocks.1.1."]
    networks = {name: files.dinov2(blocks, registers=0) for name in ("student", "teacher")}
    tensors: Tensors = {"dino_loss.center": torch.zeros(1, 8)}
    for name, network in networks.items():
        tensors |= {f"{name}.backbone.{key}": t for key, t in network.items()}
        tensors |= {f"{name}.{key}": t for key, t in files.dino_head("dino_head").items()}
    for tree, part, of in (
        ({"model": tensors}, "", "teacher"),
        ({"model": tensors}, "#student", "student"),
        (
            {"teacher": {key.removeprefix("teacher."): t for key, t in tensors.items() if key[0] == "t"}},
            "",
            "teacher",
        ),
    ):
        t = doubled(networks[of])
        teacher = load(tree, "vit_base_patch14_dinov2", part)
        assert same_features(teacher, lambda x, t=t: reference.dinov2(t, x, HEADS, blocks, gated=False))  # type: ignore[misc]


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3(load: Load, gated: bool) -> None:
    tensors = files.dinov3(gated=gated)
    t = doubled(tensors)
    name = "vit_small_plus_patch16_dinov3_qkvb" if gated else "vit_small_patch16_dinov3_qkvb"
    teacher = load(tensors, name, img_size=16, **({"mlp_ratio": 1.5} if gated else {}))
    assert same_features(teacher, lambda images: reference.dinov3(t, images, HEADS, DEPTH, (SIDE, SIDE)))
    assert teacher.model.global_pool == "token"
    assert teacher.mean == IMAGENET
    assert {"mask_token", "rope_embed.periods"} < set(teacher.report.unexpected)


def test_dinov3_with_rounded_periods_says_so(load: Load) -> None:
    tensors = files.dinov3()
    tensors["rope_embed.periods"] = torch.tensor([1.0, 10.06]).bfloat16()
    teacher = load(tensors, "vit_small_patch16_dinov3_qkvb", img_size=16)
    assert "the file's are rounded" in teacher.report.summary()
