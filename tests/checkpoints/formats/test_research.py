"""Files of MAE, DeiT, BEiT and attention transfer give the features that the papers' equations give."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.fit import resample_position
from graftvit.checkpoints.pretrained import load_pretrained
from support.files import source_files as files
from support.files.source_checks import HALF, IMAGENET, TINY, Load, doubled, loader, plain, same_features
from support.files.source_files import DEPTH, HEADS, SIDE, Tensors
from support.models import reference_vit as reference
from torch import Tensor


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return loader(tmp_path)


def test_mae_autoencoder(load: Load) -> None:
    tensors = files.mae()
    teacher = load({"model": tensors}, "vit_tiny_patch16_224")
    assert same_features(teacher, plain(tensors))
    assert teacher.mean == IMAGENET
    left = {key for key in tensors if key.startswith(("decoder", "mask_token"))}
    assert set(teacher.report.unexpected) == left
    assert set(teacher.report.unexpected.values()) == {"the decoder of masked autoencoding"}


def test_mae_fine_tuned_reads_the_mean_of_the_patches(load: Load) -> None:
    tensors = files.plain(final="fc_norm", classes=files.CLASSES)
    t = doubled(tensors)

    def expected(images: Tensor) -> Tensor:
        pooled = reference.plain_vit(t, images, HEADS, DEPTH)[:, 1:].mean(1)
        return reference.linear(reference.norm(pooled, t, "fc_norm"), t, "head")

    assert same_features(load({"model": tensors}, "vit_tiny_patch16_224"), expected, logits=True)


def test_deit_and_its_distilled_form(load: Load) -> None:
    tensors = files.plain(classes=files.CLASSES)
    t = doubled(tensors)
    teacher = load({"model": tensors}, "deit_tiny_patch16_224")
    features = plain(tensors)
    assert same_features(
        teacher, lambda images: reference.linear(features(images)[:, 0], t, "head"), logits=True
    )

    tensors = files.distilled()
    t = doubled(tensors)
    teacher = load({"model": tensors}, "deit_tiny_distilled_patch16_224")

    def mean_of_heads(images: Tensor) -> Tensor:
        tokens = plain(tensors)(images)
        first = reference.linear(tokens[:, 0], t, "head")
        return (first + reference.linear(tokens[:, 1], t, "head_dist")) / 2

    assert same_features(teacher, plain(tensors))
    assert same_features(teacher, mean_of_heads, logits=True)
    assert (teacher.has_head, teacher.mean) == (True, IMAGENET)


def test_deit3(load: Load) -> None:
    tensors = files.deit3()
    t = doubled(tensors)
    teacher = load({"model": tensors}, "deit3_small_patch16_224")
    assert same_features(teacher, lambda images: reference.deit3(t, images, HEADS, DEPTH))
    assert teacher.has_head
    assert "DeiT III" in teacher.report.format


@pytest.mark.parametrize("wrap", ["model", "module"])
@pytest.mark.parametrize("positions", [False, True])
def test_beit_fine_tuned(load: Load, wrap: str, positions: bool) -> None:
    tensors = files.beit(shared=False, final="fc_norm", classes=files.CLASSES, positions=positions)
    t = doubled(tensors)

    def expected(images: Tensor) -> Tensor:
        pooled = reference.beit(t, images, HEADS, DEPTH, SIDE)[:, 1:].mean(1)
        return reference.linear(reference.norm(pooled, t, "fc_norm"), t, "head")

    teacher = load({wrap: tensors}, "beit_base_patch16_224")
    assert same_features(teacher, expected, logits=True)
    assert teacher.mean == (HALF if wrap == "model" else IMAGENET)
    assert teacher.model.patch_embed.img_size == (16, 16)  # by the table, not timm's 224
    assert not teacher.report.resampled
    assert set(teacher.report.unexpected) == {key for key in tensors if key.endswith("position_index")}
    assert ("model=beitv2_base_patch16_224" in teacher.report.summary()) == (wrap == "model")


@pytest.mark.parametrize("second", [False, True])
def test_beit_pre_trained_shares_its_positions(load: Load, second: bool) -> None:
    tensors = files.beit(shared=True, final="norm")
    t = doubled(tensors)
    more = files.block("cls_pt_layers.0.") if second else {}
    teacher = load({"model": {**tensors, **more}}, "beit_base_patch16_224")
    assert same_features(
        teacher, lambda images: reference.norm(reference.beit(t, images, HEADS, DEPTH, SIDE), t, "norm")
    )
    assert teacher.mean == (IMAGENET if second else HALF)
    left = {"mask_token", "lm_head.weight", "lm_head.bias", "rel_pos_bias.relative_position_index", *more}
    assert set(teacher.report.unexpected) == left


def test_a_tag_of_beit2_brings_its_statistics(load: Load) -> None:
    tree = {"model": files.beit(shared=False, final="fc_norm", classes=1000)}
    assert load(tree, "beitv2_base_patch16_224.in1k_ft_in1k").mean == IMAGENET


@pytest.mark.parametrize("mode", ["distill", "copy", "copy_q"])
@pytest.mark.parametrize("part", ["", "#student", "#teacher", "#ema"])
def test_official_attention_transfer(load: Load, mode: str, part: str) -> None:
    models = {
        name: files.plain(final="fc_norm", classes=files.CLASSES) for name in ("student", "teacher", "ema")
    }

    def dual(student: str) -> Tensors:
        pairs = (("student", models[student]), ("teacher", models["teacher"]))
        return {f"{name}.{key}": t for name, tensors in pairs for key, t in tensors.items()}

    args = argparse.Namespace(mode=mode, atd_weight=3.0, model="dual_vit_base_patch16")
    tree = {"model": dual("student"), "model_ema": dual("ema"), "optimizer": {}, "epoch": 1, "args": args}
    teacher = load(tree, "vit_tiny_patch16_224", part)
    chosen = part.removeprefix("#") or "student"
    t = doubled(models[chosen])

    def expected(images: Tensor) -> Tensor:
        pooled = reference.plain_vit(t, images, HEADS, DEPTH)[:, 1:].mean(1)
        pooled = reference.norm(pooled, t, "fc_norm")
        return pooled if chosen == "teacher" else reference.linear(pooled, t, "head")

    assert same_features(teacher, expected, logits=True)
    assert teacher.has_head == (chosen != "teacher")  # its head is as it was drawn
    copied = mode != "distill" and chosen != "teacher"
    assert ("without the teacher it is not the model" in teacher.report.summary()) == copied


def resized(tensors: Tensors, rows: int, method: Any) -> Tensor:
    return resample_position(tensors["pos_embed"], (SIDE, SIDE), (6, 8), rows, method)


@pytest.mark.parametrize("method", ["timm", "mae"])
def test_positions_are_resampled_to_another_size(tmp_path: Path, method: Any) -> None:
    blocks = ["blocks.0.", "blocks.1."]
    for tensors, name, rows, arguments in (
        (files.plain(), "vit_small_patch16_224", 1, {}),
        (files.distilled(), "deit_tiny_distilled_patch16_224", 2, {}),
        (files.deit3(), "deit3_small_patch16_224", 0, {}),
        (files.dinov2(blocks, registers=0), "vit_base_patch14_dinov2", 1, {}),
        (files.dinov2(blocks, registers=2), "vit_base_patch14_reg4_dinov2", 0, {"reg_tokens": 2}),
    ):
        torch.save({"model": tensors}, tmp_path / "source.pth")
        teacher = load_pretrained(
            str(tmp_path / "source.pth"),
            model=name,
            model_args={**TINY, **arguments},
            img_size=(24, 32),
            position_embedding=method,
        )
        assert teacher.report.resampled == {"pos_embed": f"from grid 4x4 to 6x8 ({method}'s bicubic)"}
        whole = (
            {**tensors, "pos_embed": tensors["pos_embed"][:, 1:]} if "reg_tokens" in arguments else tensors
        )
        assert torch.equal(teacher.model.pos_embed, resized(whole, rows, method))
        assert teacher.model(torch.randn(1, 3, 24, 32)).isfinite().all()


def test_beits_tables_are_resampled_too(load: Load) -> None:
    for shared, final in ((True, "norm"), (False, "fc_norm")):
        tree = {"model": files.beit(shared=shared, final=final, classes=0 if shared else 3)}
        teacher = load(tree, "beit_base_patch16_224", img_size=24)
        assert all(how == "from 52 to 124 offsets (timm's way)" for how in teacher.report.resampled.values())
        assert len(teacher.report.resampled) == (1 if shared else DEPTH)


@pytest.mark.parametrize(("name", "rename"), [
    ("deit_tiny_distilled_patch16_224", {}),
    ("deit3_small_patch16_224", {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}),
])  # fmt: skip
def test_a_published_size_needs_no_name(tmp_path: Path, name: str, rename: dict[str, str]) -> None:
    with torch.random.fork_rng():
        model = timm.create_model(name, img_size=32, num_classes=3, init_values=0.1 if rename else None)
    tensors = dict(model.state_dict())
    for ours, theirs in rename.items():
        tensors = {key.replace(ours, theirs): tensor for key, tensor in tensors.items()}
    torch.save({"model": tensors}, tmp_path / "source.pth")
    teacher = load_pretrained(str(tmp_path / "source.pth"))
    assert teacher.architecture == name
    assert teacher.has_head
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(teacher.model(images), model.eval()(images))
