"""Students of a comparison that are pyramids: which cost linearly, what they cost, and which are unconverted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from graftvit.models.conversion import convert
from graftvit.models.cost import attention_macs, other_macs
from graftvit.models.families import sites
from graftvit.transfer.analysis.compare.comparison_cells import Record
from graftvit.transfer.analysis.compare.student_cell import is_linear, measure_speed
from support.models.pyramids import tiny


@pytest.mark.parametrize(
    ("plan", "linear"),
    [
        ("*: linear", True),
        ("stage1: none; stage2: linear", True),
        ("stage2: linear", False),  # the first stage has windows
        ("stage1: linear; stage2: softmax", False),
    ],
)
def test_linear_is_who_has_no_other_attention(plan: str, linear: bool) -> None:
    assert is_linear(convert(tiny("swin"), plan, without=["bias"])) == linear


def test_the_cost_of_a_student_is_without_what_the_conversion_dropped() -> None:
    teacher = tiny("pvt", (64, 64))
    student = convert(teacher, "stage1: linear")  # without the reduction of the first stage
    speed = measure_speed(teacher, student, 64, 2, 2, torch.device("cpu"))
    assert speed.macs == speed.counted_macs == sum(attention_macs(student)) + other_macs(student)
    assert speed.tokens == sites(student)[0].shape.geometry.num_tokens == 16 * 16
    assert min(speed.latency, speed.softmax_latency) > 0


def test_softmax_is_a_conversion_of_a_pyramid() -> None:
    record = Record("x", "*: softmax", 16, "", "", 0.0)
    assert not record.is_unconverted  # it failed
    assert dataclasses.replace(record, converted=False).is_unconverted
    assert not dataclasses.replace(record, converted=True).is_unconverted
    assert dataclasses.replace(record, plan="stage1: keep", converted=False).is_unconverted
