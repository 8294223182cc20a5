"""Steps on fake tensors of a GPU: every operator and method, without a wait for the GPU or a tensor on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import pytest
import torch
from graftvit.models.attention.base import Geometry, Heads
from graftvit.transfer.methods.dual import DualViT
from graftvit.transfer.methods.method_facts import method_names
from support.models.dense import tiny
from support.models.device_cases import PRECISIONS, one_step, to_fake_gpu
from support.models.operator_cases import CASES, HEADS, WIDTH, Case
from torch._subclasses.fake_tensor import FakeTensorMode

METHODS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in method_names()]
METHODS += [
    ("distill", {"rows": 0.5}),
    ("distill", {"temperature": 2.0}),
    ("distill", {"loss": "kl"}),
    ("distill", {"heads": [1]}),
    ("copy", {"heads": [1]}),
    ("copy", {"layers": [0]}),
]
FAMILIES = ["vit_no_prefix", "deit_distilled", "dinov2_registers", "qk_norm", "beit", "beit_shared", "eva02"]
STEPS = [("vit", *method) for method in METHODS]
STEPS += [(family, method, {}) for family in FAMILIES for method in ("copy", "distill")]


def in_precisions(cases: Sequence[object]) -> list[object]:
    """Each case in bf16, and in one of the other precisions in turn, which is slow."""
    others = cycle(name for name in PRECISIONS if name != "bf16")
    slow = [
        pytest.param(*pair, marks=pytest.mark.slow, id=f"{pair[0]}-{pair[1]}")
        for pair in zip(cases, others, strict=False)
    ]
    return [*(pytest.param(case, "bf16", id=f"{case}-bf16") for case in cases), *slow]


@pytest.mark.parametrize(("step", "precision"), in_precisions(STEPS))
def test_method(step: tuple[str, str, dict[str, Any]], precision: str) -> None:
    family, method, options = step
    teacher, student = (tiny(family, seed, torch.float32, depth=2) for seed in range(2))
    dual = DualViT(teacher, student, method, **options).train()
    with FakeTensorMode():
        for model in (dual, teacher):
            to_fake_gpu(model)
        images = torch.empty(2, 3, 32, 48, device="cuda")
        with one_step(precision):
            out = dual(images)
        assert out.logits.device.type == out.transfer_loss.device.type == "cuda"
        assert out.transfer_loss.dtype == torch.float32


@pytest.mark.parametrize(("case", "precision"), in_precisions(CASES))
def test_operator(case: Case, precision: str) -> None:
    geometry = Geometry(1, (7, 9))
    operator = case.build(geometry, torch.float32).train()
    with FakeTensorMode():
        to_fake_gpu(operator)
        size, dtype = (2, HEADS, geometry.num_tokens, WIDTH), PRECISIONS[precision] or torch.float32
        q, k, v = (torch.empty(size, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
        with one_step(precision):
            out = operator(Heads(q, k, v, None, 0.3, geometry=geometry))
        assert out.device.type == "cuda"
        assert out.shape == v.shape
