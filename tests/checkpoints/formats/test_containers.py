"""Which family a file is of, which part of it is taken, and what is refused in one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.formats import KEY_MAPS, read_weights
from graftvit.checkpoints.formats.keymap import recognize
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.weight_files import Weights
from graftvit.models.errors import CheckpointError
from support.files import source_files as files
from support.files.source_files import Tensors

PLAIN_BLOCKS = ["blocks.0.", "blocks.1."]
FAMILIES: dict[str, Callable[[], Tensors]] = {
    "MAE's autoencoder": files.mae,
    "a plain ViT": files.plain,
    "a plain ViT ": lambda: files.plain(final="fc_norm", classes=3),
    "an encoder of MoCo-v3": lambda: files.plain() | files.moco_head("head"),
    "iBOT's backbone": lambda: files.plain() | {"masked_embed": files.random(1, 16)},
    "a distilled DeiT": files.distilled,
    "DeiT III": files.deit3,
    "DINOv2's backbone": lambda: files.dinov2(PLAIN_BLOCKS, registers=0),
    "DINOv2's backbone ": lambda: files.dinov2(["blocks.0.0.", "blocks.1.1."], registers=4, gated=True),
    "DINOv3's backbone": files.dinov3,
    "DINOv3's backbone ": lambda: files.dinov3(gated=True),
    "BEiT": lambda: files.beit(shared=False, final="fc_norm", classes=3),
    "BEiT ": lambda: files.beit(shared=True, final="norm"),
    "BEiT  ": lambda: files.beit(shared=True, final="norm", positions=True),
    "Google's ViT (flax)": lambda: files.flax(old=True, cls=True, classes=3),
    "Google's ViT (flax) ": lambda: files.stacked(files.flax(old=False, cls=False, pooled=True)),
}


def read(tree: Any, part: Any = None) -> Weights:
    return read_weights(Weights({}, "x.pth", "torch", tree=tree), part)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_known_by_exactly_one_row(family: str) -> None:
    """Over the whole table, transformers' rows too: the order of the rows does not matter here."""
    tensors = FAMILIES[family]()
    found = [row.name for row in KEY_MAPS if recognize(tensors, (row,)) is not None]
    if family.strip() != "a plain ViT":
        found = [name for name in found if name != "a plain ViT"]  # the last resort of those it covers
    assert found == [family.strip()]
    first = recognize(tensors, KEY_MAPS)
    assert first is not None
    assert first.name == family.strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_left_out_has_a_reason_and_no_other_is_lost(family: str) -> None:
    tensors = FAMILIES[family]()
    weights = read(tensors)
    assert all(weights.left_out.values())
    assert set(weights.left_out) <= {*tensors, *(key for key in weights.left_out if "encoderblock_" in key)}
    if "flax" not in family:
        merged = {"blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"} & (
            tensors.keys() - weights.tensors.keys()
        )
        assert len(weights.tensors) == len(tensors) - len(weights.left_out) + len(merged)


def named(**models: Tensors) -> dict[str, Any]:
    return dict(models)


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + key: tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("tree", "part", "said"),
    [
        (lambda: named(model=files.plain()), "ema", "holds no moving average, only #student; leave #ema out"),
        (lambda: named(model=files.plain()), "teacher", "holds no teacher, only #student"),
        (lambda: named(state_dict=files.plain()), "teacher", "holds no teacher"),
        (lambda: files.plain(), "ema", "only one model; leave #ema out"),
        (lambda: named(teacher=files.plain(), student=files.plain()), "ema", "only #teacher and #student"),
        (lambda: named(teacher=under("backbone.", files.plain())), "student", "holds no student, only #teacher"),
        (lambda: named(teacher={}, student=files.plain()), None, r"its 'teacher' holds no weights; write #student"),
        (lambda: named(student=files.plain(), teacher={"epoch": 3}), None, "write #student behind the path"),
        (lambda: named(model={}, model_ema=files.plain()), None, r"its 'model' holds no weights; write #ema"),
        (lambda: named(model=under("student.", files.plain())), "teacher", "holds no teacher, only #student"),
        (lambda: named(model=under("teacher.backbone.", files.plain())), "student", "only #teacher"),
        (lambda: named(state_dict=under("module.base_encoder.", files.plain())), "ema", "no moving average"),
        (lambda: named(optimizer={}, epoch=torch.zeros(1)), None, "of no known format: it holds 'optimizer'"),
        (lambda: {"_orig_mod.a": torch.zeros(1), "a": torch.zeros(1)}, None, "two of its names differ"),
    ],
)  # fmt: skip
def test_a_part_that_is_not_there_is_refused(tree: Callable[[], Any], part: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        read(tree(), part)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [None, "student", "ema", "teacher"])
def test_the_parts_of_a_dual_model_are_told_apart(part: Any) -> None:
    student, average, teacher = files.plain(), files.plain(), files.plain()
    tree = named(
        model=under("student.", student) | under("teacher.", teacher),
        model_ema=under("student.", average) | under("teacher.", teacher),
    )
    chosen = {"ema": average, "teacher": teacher}.get(part, student)
    weights = read(tree, part)
    assert weights.tensors.keys() == chosen.keys()
    assert all(torch.equal(weights.tensors[key], chosen[key]) for key in chosen)
    assert len(weights.left_out) == len(chosen)


def test_an_empty_student_does_not_stand_in_the_way() -> None:
    tensors = files.plain()
    assert read(named(teacher=under("backbone.", tensors), student={})).tensors.keys() == tensors.keys()
    student = read(named(teacher={}, student=under("module.backbone.", tensors)), "student")
    assert student.tensors.keys() == tensors.keys()


def test_wrappers_anywhere_in_a_name_are_taken_off() -> None:
    tensors = files.plain()
    wrapped = {
        f"module._orig_mod.{key}".replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): tensor
        for key, tensor in tensors.items()
    }
    assert read(named(model=wrapped)).tensors.keys() == tensors.keys()


def detector(blocks: Tensors) -> Tensors:
    return {
        **under("backbone.", blocks),
        "neck.0.weight": files.random(2),
        "roi_head.fc.weight": files.random(2),
    }


@pytest.mark.parametrize(
    "tree",
    [
        lambda: named(state_dict=detector({"layers.0.blocks.0.attn.qkv.weight": files.random(2)})),  # Swin
        lambda: named(
            state_dict=detector({"conv1.weight": files.random(2), "layer1.0.bn1.bias": files.random(2)})
        ),
        lambda: named(state_dict=detector(files.plain())),  # its ViT attends in windows: not this one
        lambda: named(model=under("backbone.bottom_up.net.", files.plain())),  # ViTDet
        lambda: named(state_dict=under("backbone.", {"layers.0.attn.weight": files.random(2)})),
        lambda: {"conv1.weight": files.random(2), "layer1.0.conv1.weight": files.random(2)},
        lambda: named(state_dict=under("module.encoder_q.", {"conv1.weight": files.random(2)})),  # MoCo-v2
        lambda: named(state_dict=under("module.base_encoder.", {"layer1.0.bn1.bias": files.random(2)})),
    ],
)
def test_detectors_and_convolutions_are_of_no_supported_family(
    tmp_path: Path, tree: Callable[[], Any]
) -> None:
    torch.save(tree(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth is of no supported family: ") as caught:
        load_pretrained(str(tmp_path / "other.pth"))
    assert "\n" not in str(caught.value)


TINY: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
MODELS = {
    "MAE's autoencoder": "vit_tiny_patch16_224",
    "an encoder of MoCo-v3": "vit_small_patch16_224",
    "a distilled DeiT": "deit_tiny_distilled_patch16_224",
    "DeiT III": "deit3_small_patch16_224",
    "DINOv2's backbone": "vit_base_patch14_dinov2",
    "DINOv3's backbone": "vit_small_patch16_dinov3_qkvb",
    "BEiT": "beit_base_patch16_224",
}
QKV = "blocks.1.attn.qkv.weight"


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("blocks.1.")], r"missing keys: blocks\.1\."),
        (lambda t: t.update({QKV: t[QKV][: 2 * 16]}), r"blocks\.1\.attn\.qkv\.weight is \(32, 16\) and not \(48, 16\)"),
        (lambda t: t.pop(QKV), r"missing keys: blocks\.1\.attn\.qkv\.weight"),
        (lambda t: t.update(files.layer("head", 3, 8)), r"head\.weight is \(3, 8\) and not \(3, 16\)"),
        (lambda t: t.update({"blocks.1.extra": files.random(1)}), r"unexpected keys: blocks\.1\.extra"),
        (lambda t: t[QKV].fill_(float("inf")), r"not finite in blocks\.1\.attn\.qkv\.weight"),
        (lambda t: t.update(files.block("blocks.2.")), r"unexpected keys: blocks\.2\.|blocks\.2\.attn\.qkv\.bias has"),
    ],
)  # fmt: skip
def test_half_a_file_is_refused_by_its_keys(
    tmp_path: Path, family: str, change: Callable[[Tensors], object], said: str
) -> None:
    tensors = FAMILIES[family]()
    change(tensors)
    torch.save({"model": tensors, "args": argparse.Namespace()}, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match=said) as caught:
        load_pretrained(str(tmp_path / "half.pth"), model=MODELS[family], model_args=TINY)
    assert "half.pth" in str(caught.value)
    assert "\n" not in str(caught.value)
