"""Half precision with logits so large that a rounded one is wrong by hundreds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftvit.transfer.methods.dual import DualViT
from support.models.dense import gradient, images, relative_error, tiny
from torch import nn

METHODS = ["copy", "copy_q", "distill", "attention_output"]


def large(family: str, seed: int) -> nn.Module:
    """A model whose queries, keys and values are 300 times as large: logits of tens of thousands."""
    model = tiny(family, seed=seed, dtype=torch.float32)
    for block in model.blocks:
        block.norm1.weight.data.fill_(1)
        block.attn.qkv.weight.data.mul_(300)
    return model


@pytest.mark.parametrize("family", ["vit", "beit", "dinov3"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_finite_where_logits_are_large(method: str, family: str) -> None:
    check_finite(family, method=method)


def test_gradients_of_sampled_warm_maps_are_finite() -> None:
    check_finite("vit", loss="kl", temperature=2.0, rows=0.5)


def check_finite(family: str, **options: Any) -> None:
    teacher, student = large(family, 1), large(family, 2)
    dual = DualViT(teacher, student, **options).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = dual(images(dtype=torch.float32))
        loss = out.logits.float().square().mean() + out.transfer_loss
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(gradient(student).isfinite().all())
    assert float(gradient(student).norm()) > 0


@pytest.mark.parametrize("family", ["vit", "beit"])
@pytest.mark.parametrize("method", ["copy", "distill"])
def test_single_precision_with_large_logits(method: str, family: str) -> None:
    gradients, logits = [], []
    for dtype in (torch.float32, torch.float64):
        teacher, student = large(family, 1).to(dtype), large(family, 2).to(dtype)
        out = DualViT(teacher, student, method)(images(dtype=dtype))
        (out.logits.square().mean() + out.transfer_loss).backward()
        gradients.append(gradient(student))
        logits.append(out.logits)
    assert relative_error(*logits) < 1e-3
    assert relative_error(*gradients) < 1e-2
