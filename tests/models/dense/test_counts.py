"""Every published detector and segmenter has its number of parameters, to the integer."""

from __future__ import annotations

from typing import Any

import pytest
from graftvit.models import attnzero, cswin_models, lit
from graftvit.models.dense.dense_model import create_dense
from graftvit.models.families import create_timm_model
from graftvit.models.small import without_memory
from torch import nn

REGISTERED = (attnzero, cswin_models, lit)
RETINANET, MASK_RCNN, FCOS, SEMANTIC_FPN, UPERNET = (
    "retinanet",
    "mask_rcnn",
    "fcos",
    "semantic_fpn",
    "upernet",
)
OPEN = {"strict_img_size": False}
AT_800, AT_512 = ({**OPEN, "img_size": side} for side in (800, 512))
BACKGROUND = 4 * 1025 + 257
"""torchvision has boxes and a mask of the background, too: four rows of 1,024 weights and a bias, one of 256."""
CLASS_POSITION = 512
"""The published LIT-Ti keeps the position of its class token, which its detectors do not have."""

OF_TORCHVISION = 32_269_600 - 23_454_912 - 3_868_672
"""The FCOS that torchvision published, with 91 classes, without its ResNet-50 and its neck."""

# (timm's name, arguments, kind, outputs with a norm, published parameters)
PUBLISHED: list[tuple[str, dict[str, Any], str, tuple[int, ...], int]] = [
    ("lit_ti", {"global_pool": "avg"}, RETINANET, (), 29_621_708 - CLASS_POSITION),
    ("lit_ti", {"global_pool": "avg"}, MASK_RCNN, (), 39_539_144 - CLASS_POSITION),
    ("lit_ti", {"global_pool": "avg"}, SEMANTIC_FPN, (), 23_638_382 - CLASS_POSITION),
    ("lit_s", AT_800, RETINANET, (1, 2, 3), 38_904_292),
    ("lit_s", AT_800, MASK_RCNN, (1, 2, 3), 48_240_096),
    ("lit_s", AT_512, SEMANTIC_FPN, (0, 1, 2, 3), 31_850_502),
    ("litv2_s", OPEN, RETINANET, (1, 2, 3), 38_014_252),
    ("litv2_s", OPEN, MASK_RCNN, (1, 2, 3), 47_350_056),
    ("litv2_s", OPEN, SEMANTIC_FPN, (0, 1, 2, 3), 31_449_486),
    ("litv2_m", OPEN, RETINANET, (1, 2, 3), 59_000_620),
    ("litv2_m", OPEN, MASK_RCNN, (1, 2, 3), 68_336_424),
    ("litv2_m", OPEN, SEMANTIC_FPN, (0, 1, 2, 3), 52_435_854),
    ("litv2_b", OPEN, RETINANET, (1, 2, 3), 97_139_852),
    ("litv2_b", OPEN, MASK_RCNN, (1, 2, 3), 105_894_024),
    ("litv2_b", OPEN, SEMANTIC_FPN, (0, 1, 2, 3), 89_993_518),
    ("attnzero_pvt_t", {}, MASK_RCNN, (), 31_031_280),
    ("attnzero_pvt_t", {}, SEMANTIC_FPN, (), 15_130_518),
    ("attnzero_pvt_s", {}, MASK_RCNN, (), 39_879_344),
    ("attnzero_pvt_s", {}, SEMANTIC_FPN, (), 23_978_582),
    ("cswin_tiny", {}, UPERNET, (0, 1, 2, 3), 52_116_076),
]
PARTS: list[tuple[str, dict[str, Any], str, int, int]] = [
    ("pvt_small", {}, RETINANET, 3_786_752, 6_463_220),
    ("pvt_small", {}, FCOS, 3_786_752, OF_TORCHVISION - 11 * 2_305),
    ("pvt_small", {}, SEMANTIC_FPN, 2_623_488, 1_643_158),
    ("swin_base_patch4_window7_224", OPEN, RETINANET, 5_179_392, 6_463_220),
    ("swin_tiny_patch4_window7_224", OPEN, UPERNET, 0, 31_497_366 + 923_798),
    ("swin_base_patch4_window7_224", OPEN, UPERNET, 0, 33_315_990 + 1_218_710),
    ("cswin_tiny", {}, UPERNET, 0, 29_678_742 + 628_886),
]
"""The published parameters of neck and head."""


def count(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def made(name: str, arguments: dict[str, Any], kind: str, norms: tuple[int, ...]) -> Any:
    classes = 80 if kind in (RETINANET, MASK_RCNN, FCOS) else 150
    with without_memory():
        return create_dense(kind, create_timm_model(name, **arguments), classes, norms=norms)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "arguments", "kind", "norms", "published"), PUBLISHED)
def test_a_model_has_its_published_parameters(
    name: str, arguments: dict[str, Any], kind: str, norms: tuple[int, ...], published: int
) -> None:
    assert count(made(name, arguments, kind, norms)) == published + (BACKGROUND if kind == MASK_RCNN else 0)


@pytest.mark.parametrize(("name", "arguments", "kind", "neck", "head"), PARTS)
def test_a_neck_and_a_head_have_their_published_parameters(
    name: str, arguments: dict[str, Any], kind: str, neck: int, head: int
) -> None:
    model = made(name, arguments, kind, ())
    assert (count(model.neck), count(model.head)) == (neck, head)
