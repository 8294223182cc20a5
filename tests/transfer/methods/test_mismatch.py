"""What the mismatch report says of pairs of tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from graftvit.models.errors import TransferError
from graftvit.models.mirror import mirror_arguments
from graftvit.transfer.methods.mismatch import Mismatch, compare_models, report_mismatch

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


SHARED_BIAS = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}


def model(architecture: str = "vit_tiny_patch16_224", **arguments: Any) -> torch.nn.Module:
    return timm.create_model(architecture, **{**SMALL, **arguments})


def found(teacher: torch.nn.Module, student: torch.nn.Module) -> dict[str, Mismatch]:
    return {mismatch.name: mismatch for mismatch in compare_models(teacher, student)}


def test_equal_models_have_no_mismatch() -> None:
    assert compare_models(model(), model()) == ()
    assert report_mismatch(()) == "teacher and student are built alike"
    gated = model()
    gated.blocks[0].attn.gate = torch.nn.Linear(32, 32)
    assert found(gated, model())["gate"].teacher == "yes"
    scale = found(model(init_values=0.1), model(init_values=1e-5))["LayerScale"]
    assert (scale.teacher, scale.student, scale.warning) == ("from 0.1", "from 1e-05", None)


def test_layers_with_heads_of_their_own_are_named_and_not_mirrored() -> None:
    layers = {"embed_dim": 24, "num_heads": (3, 4), "mlp_ratio": (3, 4)}
    student = timm.create_model("attnzero_autoformer_t", img_size=32, patch_size=8, **layers)
    assert found(model(embed_dim=24), student)["heads"].student == "3 or 4"
    assert found(model(embed_dim=24), student)["head width"].student == "8 or 6"
    with pytest.raises(TransferError, match="has layers of 3 and 4 heads"):
        mirror_arguments(model(), "attnzero_autoformer_t", {"img_size": 32, "patch_size": 8, **layers})


@pytest.mark.parametrize(
    ("arguments", "name", "teacher", "student"),
    [
        ({"depth": 3}, "depth", "3", "2"),
        ({"embed_dim": 64}, "width", "64", "32"),
        ({"embed_dim": 64}, "head width", "32", "16"),
        ({"num_heads": 4}, "heads", "4", "2"),
        ({"img_size": (32, 64)}, "patch grid", "4x8", "4x4"),
        ({"reg_tokens": 2}, "prefix tokens", "cls, reg0, reg1", "cls"),
        ({"reg_tokens": 2}, "registers", "2", "0"),
        ({"class_token": False, "global_pool": "avg"}, "prefix tokens", "none", "cls"),
        ({"global_pool": "avg"}, "pooling", "avg", "token"),
        ({"init_values": 1e-5}, "LayerScale", "from 1e-05", "no"),
        ({"pre_norm": True}, "pre-norm", "yes", "no"),
        ({"act_layer": "quick_gelu"}, "activation", "quick_gelu", "gelu"),
        ({"qk_norm": True}, "q, k norm", "yes", "no"),
        ({"scale_attn_norm": True}, "attention norm", "yes", "no"),
        ({"scale_mlp_norm": True}, "MLP", "MLP with norm", "MLP"),
        ({"qkv_bias": False}, "qkv bias", "no", "yes"),
        ({"pos_embed": "none"}, "position", "none", "learned absolute"),
    ],
)
def test_a_difference_is_named_both_ways(
    arguments: dict[str, Any], name: str, teacher: str, student: str
) -> None:
    forward = found(model(**arguments), model())[name]
    assert (forward.teacher, forward.student) == (teacher, student)
    backward = found(model(), model(**arguments))[name]
    assert (backward.teacher, backward.student) == (student, teacher)
    assert backward.warning is None, "a part that only the student has was not seen to hurt"


@pytest.mark.parametrize(
    ("architecture", "position", "mlp"),
    [
        ("beit_base_patch16_224", "relative bias", "MLP"),
        ("eva02_small_patch14_224", "learned absolute + rotary", "SwiGLU"),
        ("eva02_base_patch14_224", "learned absolute + rotary", "SwiGLU with norm"),
        ("vit_small_patch16_dinov3", "rotary", "MLP"),
        ("vit_giant_patch14_dinov2", "learned absolute", "SwiGLU"),
    ],
)
def test_position_and_mlp_of_other_families(architecture: str, position: str, mlp: str) -> None:
    differences = found(model(architecture), model())
    default = Mismatch("", "learned absolute", "")
    assert differences.get("position", default).teacher == position
    assert differences.get("MLP", Mismatch("", "MLP", "")).teacher == mlp


@pytest.mark.parametrize(
    ("architecture", "arguments", "warned"),
    [
        ("vit_small_patch14_dinov2", {}, {"LayerScale"}),
        ("vit_small_patch14_reg4_dinov2", {}, {"LayerScale", "registers"}),
        ("vit_base_patch16_clip_quickgelu_224", {}, {"pre-norm", "activation"}),
        ("beitv2_base_patch16_224", {}, {"LayerScale", "position"}),
        ("beit_base_patch16_224", SHARED_BIAS, {"LayerScale", "position"}),
        ("vit_tiny_patch16_224", {"depth": 3, "qk_norm": True, "global_pool": "avg"}, set()),
    ],
)
def test_warnings_stand_where_transfer_was_seen_to_fail(
    architecture: str, arguments: dict[str, Any], warned: set[str]
) -> None:
    differences = found(model(architecture, **arguments), model())
    assert {name for name, mismatch in differences.items() if mismatch.warning} == warned
    for name in warned:
        warning = differences[name].warning or ""
        assert "was seen to fail" in warning
        assert "arXiv:2605.07191" in warning
        assert "student.mirror_teacher: true" in warning


def test_report_is_a_table_with_the_warnings_below() -> None:
    text = report_mismatch(compare_models(model("vit_small_patch14_dinov2", depth=3), model()))
    lines = text.splitlines()
    assert lines[0].split() == ["teacher", "student"]
    assert lines[1].split() == ["depth", "3", "2"]
    assert lines[1].index("3") == lines[0].index("teacher")
    assert lines[1].index("2") == lines[0].index("student")
    assert lines[-1].startswith("warning: the teacher has LayerScale")
