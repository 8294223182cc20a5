"""Published architectures are known by what their blocks hold and by their widths; others are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.architecture import infer_architecture
from graftvit.checkpoints.weight_files import Weights
from graftvit.models.errors import CheckpointError
from graftvit.models.small import without_memory
from torch import Tensor


def shapes(name: str, **arguments: Any) -> dict[str, Tensor]:
    with without_memory():
        return dict(timm.create_model(name, num_classes=0, **arguments).state_dict())


def infer(tensors: dict[str, Tensor], **known: Any) -> tuple[str, dict[str, Any]]:
    return infer_architecture(Weights(tensors, "x.pth", "", model_args=known))


@pytest.mark.parametrize("name", [
    "vit_tiny_patch16_224", "vit_small_patch8_224", "vit_base_patch32_224", "vit_large_patch14_224",
    "vit_huge_patch14_224", "vit_giant_patch14_224", "vit_gigantic_patch14_224",
    "deit_tiny_distilled_patch16_224", "deit_base_distilled_patch16_224",
    "deit3_small_patch16_224", "deit3_medium_patch16_224", "deit3_large_patch16_224", "deit3_huge_patch14_224",
    "vit_small_patch14_dinov2", "vit_large_patch14_dinov2", "vit_giant_patch14_dinov2",
    "vit_base_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb", "vit_base_patch16_dinov3_qkvb",
    "vit_huge_plus_patch16_dinov3", "vit_7b_patch16_dinov3",
    "beit_base_patch16_224", "beit_large_patch16_224",
    "vit_base_patch16_siglip_224", "vit_large_patch16_siglip_256", "vit_so400m_patch14_siglip_224",
])  # fmt: skip
def test_a_published_architecture_is_named_as_timm_does(name: str) -> None:
    tensors = shapes(name)
    assert infer(tensors) == (name, {})


@pytest.mark.parametrize(("name", "arguments"), [
    ("vit_small_patch16_224", {"patch_size": 12}), ("vit_huge_patch14_224", {"patch_size": 16}),
    ("vit_base_patch16_224", {"in_chans": 1}), ("vit_base_patch14_dinov2", {"patch_size": 16}),
    ("vit_small_patch14_reg4_dinov2", {"reg_tokens": 8}), ("deit3_base_patch16_224", {"patch_size": 8}),
    ("vit_small_patch16_dinov3_qkvb", {"num_reg_tokens": 2}), ("beit_base_patch16_224", {"patch_size": 8}),
    ("deit_small_distilled_patch16_224", {"patch_size": 8, "in_chans": 4}),
])  # fmt: skip
def test_what_differs_from_it_is_an_argument(name: str, arguments: dict[str, Any]) -> None:
    tensors = shapes(name, **arguments)
    found, inferred = infer(tensors)
    assert (found, inferred) == (name, arguments)
    again = shapes(found, **inferred)
    assert {key: tensor.shape for key, tensor in again.items()} == {
        key: tensor.shape for key, tensor in tensors.items()
    }


def test_a_model_without_a_class_token_is_named_only_where_the_format_says_so() -> None:
    arguments = {"class_token": False, "global_pool": "avg"}
    tensors = shapes("vit_base_patch16_224", **arguments)
    with pytest.raises(CheckpointError, match=r"as teacher\.model"):
        infer(tensors)
    assert infer(tensors, class_token=False) == ("vit_base_patch16_224", {})


def without(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def remove(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(names)]:
            del tensors[key]

    return remove


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("blocks.3.", "blocks.7."), r"not whole: of 12 blocks it lacks blocks\.3, blocks\.7$"),
        (without("blocks.11."), "width 192 and depth 11 are of no published ViT.*as teacher.model"),
        (without("blocks.0.mlp.fc1.bias"), "not those of a plain ViT.*as teacher.model"),
        (without("patch_embed"), "not those of a plain ViT.*as teacher.model"),
        (without("pos_embed"), "not those of a plain ViT.*as teacher.model"),
        (without("cls_token"), "as teacher.model"),
        (without("blocks"), r"of no supported family: it holds cls_token, pos_embed.*MAE, DeiT"),
        (lambda t: t.update({"patch_embed.proj.weight": torch.zeros(192, 3)}), "not those of a plain ViT"),
        (lambda t: t.update({"patch_embed.proj.weight": torch.zeros(192, 3, 8, 16)}), "of no published ViT"),
        (lambda t: t.update({"patch_embed.proj.weight": torch.zeros(200, 3, 16, 16)}), "width 200"),
        (lambda t: t.update({"norm_pre.weight": torch.zeros(192)}), "not those of a plain ViT"),
        (lambda t: t.update({"reg_token": torch.zeros(1, 4, 192)}), "not those of a plain ViT"),
        (lambda t: t.update({"blocks.0.attn.q_norm.weight": torch.zeros(64)}), "not those of a plain ViT"),
    ],
)  # fmt: skip
def test_what_could_be_anything_is_asked_for_or_refused(
    change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    tensors = shapes("vit_tiny_patch16_224")
    change(tensors)
    with pytest.raises(CheckpointError, match=said) as caught:
        infer(tensors)
    assert str(caught.value).startswith("x.pth ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [
    "swin_tiny_patch4_window7_224", "resnet18", "mixer_s16_224", "cait_xxs24_224", "xcit_nano_12_p16_224",
    "convnext_atto",
])  # fmt: skip
def test_other_families_are_not_taken_for_one(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"of no supported family|not those of a plain ViT"):
        infer(shapes(name))
