"""Times are of one call, memory is the peak, and the counter sees what fused attention hides."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graftvit.models.cost import counted_macs
from graftvit.transfer.analysis.benchmark_cases import (
    SHORTEST,
    Step,
    keep_freed_memory,
    peak_bytes,
    time_steps,
)

CPU = torch.device("cpu")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Work of so many seconds, on a clock that nothing else moves."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    return work


def test_a_timing_is_of_one_call_and_quick_steps_are_repeated(work: Callable[[float], None]) -> None:
    seconds = {"long": 0.2, "slow": 0.02, "quick": 0.0005}
    calls = dict.fromkeys(seconds, 0)

    def working(name: str) -> Step:
        def step() -> None:
            calls[name] += 1
            work(seconds[name])

        return step

    timings = time_steps({name: working(name) for name in seconds}, 3, CPU)
    for name, timing in timings.items():
        assert timing.median == pytest.approx(seconds[name])
    assert calls["long"] == 2 + 3
    assert calls["slow"] == 2 + 3 * (1 + 1)
    assert calls["quick"] == 2 + 3 * (1 + round(SHORTEST / seconds["quick"]))


def test_no_timing_of_a_quick_step_has_the_caches_of_another(work: Callable[[float], None]) -> None:
    """The first call after another step takes ten times as long here."""
    last = [""]

    def caching(name: str) -> Step:
        def step() -> None:
            work(0.01 if last[0] == name else 0.1)
            last[0] = name

        return step

    timings = time_steps({name: caching(name) for name in ("one", "two")}, 3, CPU)
    assert [timing.high for timing in timings.values()] == pytest.approx([0.01, 0.01])


def test_processor_time_stands_beside_the_clock() -> None:
    """Waiting is what others on the machine make of a call: it takes time on the clock, and none of the processor."""
    timing = time_steps({"waits": lambda: time.sleep(0.02)}, 2, CPU)["waits"]
    assert timing.cpu is not None
    assert timing.median > 0.02 > 4 * timing.cpu


def test_the_quartiles_are_around_the_median(work: Callable[[float], None]) -> None:
    rounds = iter([1.0, 1.0, 0.01, 0.05, 0.03, 0.02, 0.04])
    timing = time_steps({"drifts": lambda: work(next(rounds))}, 5, CPU)["drifts"]
    assert (timing.low, timing.median, timing.high) == pytest.approx((0.02, 0.03, 0.04))


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have no mallopt")
def test_freed_memory_stays_with_the_process() -> None:
    import resource

    def pages() -> int:
        """Count the pages that the system gives for a tensor of 16,384 pages, too large to be kept by default."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(16384, 4096, dtype=torch.uint8).add_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    assert min(pages() for _ in range(8)) < 1024, "freed memory fits the same tensor again after a few calls"
