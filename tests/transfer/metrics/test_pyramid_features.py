"""The feature of a pyramid, for nearest neighbors, probes and distances, is what timm's head reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftvit.models.conversion import convert
from graftvit.transfer.metrics.distance import Reader
from support.models.pyramids import TINY, images, tiny


@pytest.mark.parametrize("plan", [None, "stage1: none; stage2: linear"])
@pytest.mark.parametrize("kind", TINY)
def test_the_feature_is_what_the_head_reads(kind: str, plan: str | None) -> None:
    teacher = tiny(kind)
    model: Any = teacher if plan is None else convert(teacher, plan, without=["bias"])
    with torch.no_grad():
        read = Reader(model)(images((32, 32)))
        expected = model.forward_head(model.forward_features(images((32, 32))), pre_logits=True)
        torch.testing.assert_close(read.feature, expected)
        torch.testing.assert_close(read.logits, model.get_classifier()(expected))
