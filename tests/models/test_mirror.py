"""A mirrored student has the teacher's parts, its own size and fresh weights, in every family."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from graftvit.models.errors import TransferError, UnsupportedModelError
from graftvit.models.families import attention_shape, token_layout
from graftvit.models.mirror import mirror_arguments
from graftvit.models.parts import native_parts
from graftvit.transfer.methods.mismatch import compare_models
from timm.models.vision_transformer import VisionTransformer

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STUDENT: dict[str, Any] = {
    **SMALL,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "img_size": 48,
    "num_classes": 5,
}
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "reg_tokens": 2}),
    "no position": ("vit_tiny_patch16_224", {"pos_embed": "none"}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True, "qkv_bias": False, "scale_attn_norm": True}),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {"init_values": 0.01}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov2 giant": ("vit_giant_patch14_dinov2", {}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beitv2": ("beitv2_base_patch16_224", {}),
    "shared bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva02 small": ("eva02_small_patch14_224", {}),
    "eva02": ("eva02_base_patch14_224", {}),
    "eva02 clip": ("eva02_base_patch16_clip_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "rope mixed": ("vit_small_patch16_rope_mixed_224", {}),
}
SIZES = {"depth", "width", "heads", "head width", "patch grid", "pooling"}


def teacher_of(name: str) -> torch.nn.Module:
    architecture, arguments = TEACHERS[name]
    torch.manual_seed(0)
    return timm.create_model(architecture, **{**SMALL, **arguments})


def mirrored(teacher: torch.nn.Module, arguments: dict[str, Any] | None = None) -> torch.nn.Module:
    architecture, made = mirror_arguments(teacher, "vit_tiny_patch16_224", arguments or STUDENT)
    torch.manual_seed(1)
    return timm.create_model(architecture, **made)


@pytest.mark.parametrize("name", TEACHERS)
def test_only_sizes_differ_after_mirroring(name: str) -> None:
    teacher = teacher_of(name)
    student = mirrored(teacher, {**STUDENT, "global_pool": "avg"})
    found = compare_models(teacher, student)
    assert {mismatch.name for mismatch in found} <= SIZES
    assert not any(mismatch.warning for mismatch in found)
    assert type(student) is type(teacher)
    assert token_layout(student).prefix == token_layout(teacher).prefix
    assert token_layout(student).grid == (6, 6)
    shape = attention_shape(student)
    assert (shape.depth, shape.width, shape.num_heads) == (3, 48, 3)
    assert student.num_classes == 5
    assert student(torch.zeros(2, 3, 48, 48)).shape[-1] == 5


@pytest.mark.parametrize("name", TEACHERS)
def test_mirror_of_the_same_size_has_the_same_shapes_and_other_weights(name: str) -> None:
    teacher = teacher_of(name)
    keep = {**SMALL, "num_classes": teacher.num_classes, "global_pool": teacher.global_pool}
    if not teacher.num_prefix_tokens or teacher.cls_token is None:
        keep["class_token"] = False
    student = mirrored(teacher, keep)
    ours, theirs = student.state_dict(), teacher.state_dict()
    same_mlp = native_parts(teacher).mlp == "MLP"
    assert set(ours) == set(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in ours if not same_mlp or ".mlp." not in key)
    assert not torch.equal(ours["blocks.0.attn.proj.weight"], theirs["blocks.0.attn.proj.weight"])
    assert not torch.equal(ours["patch_embed.proj.weight"], theirs["patch_embed.proj.weight"])


@pytest.mark.parametrize("name", TEACHERS)
def test_arguments_survive_json(name: str) -> None:
    architecture, arguments = mirror_arguments(
        teacher_of(name), "vit_tiny_patch16_224", STUDENT | {"global_pool": "avg"}
    )
    again = timm.create_model(architecture, **json.loads(json.dumps(arguments)))
    assert token_layout(again).grid == (6, 6)


def test_layer_scale_starts_where_the_teachers_started() -> None:
    teacher = teacher_of("beit")
    torch.nn.init.constant_(teacher.blocks[0].gamma_1, 7.0)  # as after training
    student = mirrored(teacher)
    assert student.blocks[0].gamma_1.eq(0.1).all()


def test_the_students_own_part_gives_way_and_the_rest_is_kept() -> None:
    asked = {**STUDENT, "reg_tokens": 4, "init_values": 0.5, "drop_path_rate": 0.3, "mlp_ratio": 2}
    student = mirrored(teacher_of("clip"), asked)
    parts = native_parts(student)
    assert (parts.registers, parts.layer_scale, parts.activation) == (0, None, "quick_gelu")
    assert student.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert student.blocks[0].mlp.fc1.out_features == 96


def test_a_gated_mlp_keeps_the_teachers_ratio() -> None:
    teacher, student = teacher_of("eva02"), mirrored(teacher_of("eva02"))
    assert teacher.blocks[0].mlp.fc2.in_features * 48 // 32 == student.blocks[0].mlp.fc2.in_features
    giant, small = teacher_of("dinov2 giant"), mirrored(teacher_of("dinov2 giant"))
    assert giant.blocks[0].mlp.fc2.in_features * 48 // 32 == small.blocks[0].mlp.fc2.in_features


def test_non_square_images_and_patches() -> None:
    asked = {**STUDENT, "img_size": (32, 64), "patch_size": (8, 16)}
    assert token_layout(mirrored(teacher_of("beit"), asked | {"global_pool": "avg"})).grid == (4, 4)


def test_distilled_deit_reads_its_tokens_whatever_pooling_was_asked() -> None:
    assert mirrored(teacher_of("deit distilled"), {**STUDENT, "global_pool": "avg"}).global_pool == "token"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("beit", {"dynamic_img_size": True}, r"student\.model_args\.dynamic_img_size.*Beit.*valid: "),
        ("no class token", {"global_pool": "token"}, r"student\.global_pool=token.*class token"),
        ("beit", {"global_pool": "map"}, r"student\.global_pool=map.*valid: avg, token"),
        ("vit", {"num_heads": 5}, r"student\.model vit_tiny_patch16_224 cannot be built"),
        ("vit", {"depht": 5}, r"student\.model .*depht"),
    ],
)
def test_mistakes_name_the_key(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TransferError, match=message):
        mirror_arguments(teacher_of(name), "vit_tiny_patch16_224", STUDENT | change)


def test_teacher_without_an_architecture_name_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="architecture's name"):
        mirror_arguments(VisionTransformer(**SMALL), "vit_tiny_patch16_224", STUDENT)


def test_other_families_are_refused_with_the_list() -> None:
    with pytest.raises(UnsupportedModelError, match="supported are"):
        mirror_arguments(teacher_of("vit"), "resnet18", {})
