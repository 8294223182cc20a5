"""Whole models: what is counted is attention alone, and sizes and sources are checked first."""

from __future__ import annotations

import pytest
from graftvit.models.errors import GraftError
from graftvit.transfer.analysis.benchmark.cases import Ways
from graftvit.transfer.analysis.benchmark.model_cases import (
    attention_macs,
    load_model,
    measure_model,
    model_cases,
)

TINY = "vit_tiny_patch16_224"


def test_attention_of_a_model_is_counted_without_the_rest() -> None:
    assert attention_macs(load_model(TINY, 64)) == 12 * 2 * 17**2 * 192
    (case,) = model_cases([TINY], ["0-5: ttt"], [64], Ways())
    measured = measure_model(case, 2)
    assert measured.counted_macs == measured.macs
    inner = 17 * 9 * 64**2 * 3 + 16 * 18 * 192
    assert measured.macs == 6 * (2 * 17**2 * 192 + inner)


def test_every_combination_is_a_case() -> None:
    found = model_cases([TINY], ["*: linear", "*: ttt"], [96, 64], Ways([1, 4], backward=True))
    assert len(set(found)) == 2 * 2 * 2 * 2
    assert [case.size for case in found] == [64] * 8 + [96] * 8


@pytest.mark.parametrize(
    ("source", "plan", "size", "words"),
    [
        ("vit_tinny_patch16_224", "*: linear", 64, "vit_tin"),
        (TINY, "*: liner", 64, "liner"),
        (TINY, "40: linear", 64, "layer 40"),
        (TINY, "*: linear", 100, "--img_size 100: .* take 96"),
        ("resnet18", "*: linear", 64, "resnet"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(
    source: str, plan: str, size: int, words: str
) -> None:
    with pytest.raises(GraftError, match=words):
        model_cases([source], [plan], [size], Ways())


def test_the_backward_pass_learns_every_weight() -> None:
    case = model_cases([TINY], ["*: linear"], [32], Ways([2], backward=True))[1]
    assert case.backward
    assert measure_model(case, 2).median > 0
