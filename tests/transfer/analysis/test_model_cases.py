"""Whole models: what is counted is attention alone, and sizes and sources are checked first."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.models.cost import attention_macs
from graftvit.models.errors import GraftError
from graftvit.transfer.analysis.benchmark import load_model, measure_model, model_cases
from graftvit.transfer.analysis.benchmark_cases import Ways
from support.models import pyramids

TINY = "vit_tiny_patch16_224"


def test_attention_of_a_model_is_counted_without_the_rest() -> None:
    assert sum(attention_macs(load_model(TINY, 64))) == 12 * 2 * 17**2 * 192
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
        ("resnet18", "*: linear", 64, "ResNet"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(
    source: str, plan: str, size: int, words: str
) -> None:
    with pytest.raises(GraftError, match=words):
        model_cases([source], [plan], [size], Ways())


@pytest.mark.slow
def test_the_backward_pass_learns_every_weight() -> None:
    case = model_cases([TINY], ["*: linear"], [32], Ways([2], backward=True))[1]
    assert case.backward
    assert measure_model(case, 2).median > 0


@pytest.mark.parametrize("kind", ["pvt", "svt", "swin"])
def test_pyramids_are_counted_stage_by_stage(kind: str, tmp_path: Path) -> None:
    model = pyramids.tiny(kind)
    shown = Preprocessing.of(model, input_size=(3, 32, 32))
    write_student(
        model,
        tmp_path / "model",
        architecture=pyramids.TINY[kind][0],
        model_args=pyramids.arguments(kind),
        preprocessing=shown,
    )
    plan = "stage1: none; stage2: linear"
    (case,) = model_cases([f"local-dir:{tmp_path / 'model'}"], [plan], [64], Ways(without=("bias",)))
    assert str(case).endswith("forward, without bias")
    measured = measure_model(case, 2)
    tokens, heads, head_dim, layers = 8 * 8, 2, 8, 2  # of the second of two stages
    assert measured.macs == measured.counted_macs == layers * tokens * heads * head_dim * (2 * head_dim + 1)


def test_a_bias_is_given_up_only_when_told_so() -> None:
    with pytest.raises(GraftError, match="layer 4 has a relative position bias"):
        model_cases(["swin_tiny_patch4_window7_224"], ["stage3: linear"], [64], Ways())
    with pytest.raises(GraftError, match="without=bias: a VisionTransformer keeps"):
        model_cases([TINY], ["*: linear"], [64], Ways(without=("bias",)))
