"""Blocks that are run again in the backward pass read the geometry of their own forward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graftvit.models.conversion import convert, converted_layers, plan_of
from graftvit.models.replay import _state
from graftvit.transfer.methods.dual import DualViT
from support.models.dense import gradient, images, relative_error, tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

SIZES = [(32, 48), (48, 32), (16, 96)]  # as many patches in other grids


def converted(plan: str, checkpointing: bool) -> Any:
    torch.manual_seed(0)
    model: Any = convert(tiny(seed=2, dynamic_img_size=True), plan).train()
    model.set_grad_checkpointing(checkpointing)
    return model


@pytest.mark.parametrize("plan", ["*: window(window=2)", "*: hybrid", "*: agent", "0: dilated"])
def test_a_converted_model_with_images_of_several_sizes(plan: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = converted(plan, checkpointing)
        losses = [model(images(size=size)).square().sum() for size in SIZES]
        for loss in losses:
            loss.backward()
        assert isinstance(model.blocks, nn.Module)
        grads.append(gradient(model))
    assert relative_error(*grads) < 1e-6  # timm resamples position embeddings in float32


@pytest.mark.parametrize("method", ["attention_output", "block_output"])
def test_a_converted_model_that_is_taught(method: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = converted("*: window(window=2)", checkpointing)
        dual = DualViT(tiny(seed=1, dynamic_img_size=True), model, method).train()
        outs = [dual(images(size=size)) for size in SIZES]
        for out in outs:
            (out.logits.square().sum() + out.transfer_loss).backward()
        grads.append(gradient(model))
    assert relative_error(*grads) < 1e-6


def test_a_forward_that_fails_leaves_nothing_to_the_next() -> None:
    plain, failing = converted("*: window(window=2)", False), converted("*: window(window=2)", True)
    handle = failing.norm_pre.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing(images(size=SIZES[1]))
    handle.remove()
    for model in (plain, failing):
        model(images()).square().sum().backward()
    assert torch.equal(gradient(plain), gradient(failing))
    assert isinstance(copy.deepcopy(failing).blocks, nn.Module)


def test_an_interrupted_forward_hides_no_layer() -> None:
    model = converted("*: linear", True)
    plan, expected = plan_of(model), copy.deepcopy(model).eval()
    model.patch_embed(images())
    assert plan_of(model) == plan
    assert len(converted_layers(model)) == len(expected.blocks)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images()), expected(images()), rtol=0, atol=1e-12)


def test_a_block_of_fake_tensors_is_compared_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with FakeTensorMode():
            block = nn.Linear(3, 3)
            before = _state(block)
            assert _state(block) == before
            block.weight.data = torch.empty(3, 3)
            assert _state(block) != before
    finally:
        torch.set_warn_always(always)
    assert not list(recwarn)
