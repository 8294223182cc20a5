"""Times are of one call, memory is the peak, and the counter sees what fused attention hides."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from graftvit.transfer.benchmark.measure import Step, counted_macs, peak_bytes, time_steps

CPU = torch.device("cpu")


def test_a_timing_is_of_one_call_and_quick_steps_are_repeated() -> None:
    calls = {"slow": 0, "quick": 0}

    def sleeping(name: str, seconds: float) -> Step:
        def step() -> None:
            calls[name] += 1
            time.sleep(seconds)

        return step

    steps = {"slow": sleeping("slow", 0.02), "quick": sleeping("quick", 0.0005)}
    timings = time_steps(steps, 3, CPU)
    assert 0.019 < timings["slow"].median < 0.2
    assert 0.0004 < timings["quick"].median < timings["slow"].median
    assert calls["slow"] == 2 + 3
    assert calls["quick"] > 2 + 3 * 2


def test_the_quartiles_are_around_the_median() -> None:
    pauses = iter([0.0, 0.0, 0.01, 0.02, 0.03, 0.04, 0.05])
    timing = time_steps({"drifts": lambda: time.sleep(next(pauses, 0.0) + 0.006)}, 5, CPU)["drifts"]
    assert timing.low < timing.median < timing.high
    assert timing.low == pytest.approx(0.026, abs=0.006)
    assert timing.high == pytest.approx(0.046, abs=0.006)


def test_the_peak_is_what_lives_at_once() -> None:
    x = torch.randn(256, 1024)  # a MiB

    def one_after_the_other() -> None:
        for _ in range(4):
            torch.exp(x)

    def all_at_once() -> None:
        kept = [torch.exp(x) for _ in range(4)]
        del kept

    assert peak_bytes(one_after_the_other, CPU) == pytest.approx(2**20, rel=0.01)
    assert peak_bytes(all_at_once, CPU) == pytest.approx(4 * 2**20, rel=0.01)


def test_the_counter_sees_the_products_of_fused_attention() -> None:
    q = torch.randn(1, 2, 50, 8)
    assert counted_macs(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 50 * 50 * 8
    assert counted_macs(lambda: q.exp()) == 0
