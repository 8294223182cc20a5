"""Pairs of small models of which one copies the other's attention, side by side and as one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from graftvit.models.copied import CopiedTeacher, copy_attention
from graftvit.models.copying.teacher_view import Normalization
from graftvit.transfer.methods.dual import DualViT
from support.models.dense import FAMILIES, TINY, tiny
from torch import nn

HALF, OTHER = Normalization((0.5,) * 3, (0.5,) * 3), Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "alike": ({}, {}, {}),
    "first layers": ({}, {}, {"layers": "first:2"}),
    "unequal depth": ({"depth": 4}, {}, {"layers": [(3, 0), (1, 2)]}),
    "some heads": ({}, {}, {"heads": [0, 3]}),
    "prefix tokens": ({"family": "dinov2_registers"}, {"family": "deit_distilled"}, {}),
    "no prefix": ({}, {"family": "vit_no_prefix"}, {}),
    "larger images": ({"img_size": (64, 96), "patch_size": 16}, {}, {}),
    "norms": ({"family": "clip"}, {"family": "qk_norm"}, {}),
    "relative bias": ({"family": "beit"}, {"family": "beit_shared"}, {"layers": "first:2"}),
    "rotary": ({"family": "dinov3"}, {"family": "eva02"}, {"layers": "first:2"}),
}
MAPS = {
    "unequal heads": ({"num_heads": 8, "embed_dim": 48}, {}, {"heads": "0>1,5>1,2>3"}),
    "means": ({"num_heads": 8}, {}, {"heads": "mean"}),
}
"""Cases of whole maps alone."""


def arguments(**changes: Any) -> tuple[str, dict[str, Any]]:
    name, options = FAMILIES[changes.pop("family", "vit")]
    return name, {**TINY, **options, **changes}


def pair(case: str, method: str, dtype: torch.dtype = torch.float64) -> tuple[DualViT, CopiedTeacher]:
    theirs, ours, options = (CASES | MAPS)[case]
    teacher, student = tiny(seed=1, dtype=dtype, **theirs), tiny(seed=2, dtype=dtype, **ours)
    norms = {"teacher_normalization": OTHER, "student_normalization": HALF}
    return DualViT(teacher, student, method, **norms, **options).eval(), CopiedTeacher(  # type: ignore[arg-type]
        *arguments(**theirs), OTHER
    )


def whole(dual: DualViT, teacher: CopiedTeacher) -> nn.Module:
    return copy_attention(copy.deepcopy(dual.release(bare=True)), dual.teacher, dual.copying(teacher)).eval()
