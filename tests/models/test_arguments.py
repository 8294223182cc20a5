"""A value of a wrong type, or no choice, given to a public function is one sentence that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.models.errors import GraftError
from support.models.dense import tiny
from torch import nn

NAME = "vit_tiny_patch16_224"


def model() -> nn.Module:
    return tiny(depth=1)


WRONG: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: graftvit.load_pretrained(NAME, position_embedding="zz"),
        "position_embedding='zz'; .*mae, published, timm",
    ),
    (lambda: graftvit.load_pretrained(3), "source is a int"),
    (
        lambda: graftvit.load_pretrained(NAME, img_size="224"),
        r"img_size='224'; give int or tuple\[int, int\]",
    ),
    (lambda: graftvit.load_pretrained(NAME, img_size=(1, 2, 3)), r"img_size=\(1, 2, 3\)"),
    (lambda: graftvit.load_pretrained(NAME, num_classes=True), "num_classes=True; give int or None"),
    (lambda: graftvit.load(NAME, model=model()), "model=a VisionTransformer; give str or None"),
    (lambda: graftvit.load(NAME, dtype="bf16"), "dtype='bf16'"),
    (lambda: graftvit.save(NAME, 3), "folder=3"),
    (lambda: graftvit.convert("runs/teacher", "*: linear"), "model='runs/teacher'; give Module"),
    (lambda: graftvit.convert(model(), "*: linear", weights="zz"), "weights='zz'; .*all, mlp, none"),
    (lambda: graftvit.convert(model(), "*: linear", without="bias"), "without='bias'; give Collection"),
    (lambda: graftvit.convert(model(), plan=3), "plan=3; give str or Mapping"),
    (lambda: graftvit.train("digits_scratch"), "config='digits_scratch'; give RunConfig"),
    (lambda: graftvit.DualViT(3, model()), "teacher is of type int"),
    (lambda: graftvit.DualViT({}, model()), "teacher=.* names no model"),
    (lambda: graftvit.DualViT(model(), None), "student is of type NoneType"),
    (lambda: graftvit.DualViT(model(), tiny(seed=1, depth=1), calibration=3), "calibration=3; give Tensor"),
    (lambda: graftvit.DualViT(model(), tiny(seed=1, depth=1))(3), "images is int: give a tensor"),
    (
        lambda: graftvit.DualViT(model(), tiny(seed=1, depth=1))(torch.zeros(3, 32, 48)),
        r"\(3, 32, 48\): give",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_a_wrong_argument_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(GraftError, match=message):
        call()


def test_what_an_annotation_allows_is_taken() -> None:
    small = timm.create_model(NAME, depth=1, img_size=32)
    assert graftvit.convert(small, {0: "linear"}, without=[], calibration=None, seed=torch.tensor(1).item())
