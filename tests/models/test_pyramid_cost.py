"""The cost of a pyramid is what torch's counter counts, at sizes that windows do not divide, too."""

from __future__ import annotations

from functools import partial

import pytest
from graftvit.models.conversion import convert
from graftvit.models.cost import attention_macs, other_macs
from graftvit.transfer.analysis.benchmark.cases import counted_macs, step_of
from support.models.pyramids import SIZES, TINY, images, tiny


@pytest.mark.parametrize("plan", [None, "stage1: none; stage2.1: linear", "*: softmax"])
@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("kind", TINY)
def test_every_multiplication_is_counted_once(kind: str, size: tuple[int, int], plan: str | None) -> None:
    model = tiny(kind, size)
    model = model if plan is None else convert(model, plan, without=["bias"])
    counted = counted_macs(step_of(partial(model, images(size, 1))))
    assert sum(attention_macs(model)) + other_macs(model) == counted
