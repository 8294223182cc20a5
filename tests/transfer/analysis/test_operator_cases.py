"""Cases of single operators: what is measured is what was asked for, in the layout of a layer."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from graftvit.models.cost import counted_macs
from graftvit.models.errors import ConfigError
from graftvit.models.layer_plan import OPERATORS
from graftvit.transfer.analysis import benchmark as measuring
from graftvit.transfer.analysis.benchmark import Layer, grid_of, measure_operator, operator_cases
from graftvit.transfer.analysis.benchmark_cases import Step, Timing, Ways
from support.runs.benchmark_rows import case

TINY = Layer(heads=2, head_dim=8)


@pytest.mark.parametrize(
    ("tokens", "grid"), [(196, (14, 14)), (4096, (64, 64)), (384, (16, 24)), (1, (1, 1)), (2, (1, 2))]
)
def test_the_grid_is_the_squarest(tokens: int, grid: tuple[int, int]) -> None:
    assert grid_of(tokens) == grid


@pytest.mark.parametrize("tokens", [197, 577, 0, 13])
def test_a_number_that_is_no_grid_is_refused_with_one_that_is(tokens: int) -> None:
    with pytest.raises(ConfigError, match=rf"--tokens {tokens}: .* take \d+ \("):
        grid_of(tokens)


def test_every_combination_is_a_case_once() -> None:
    names, dtypes = ["linear", "window(window=4)"], ["float32", "bfloat16"]
    cases = operator_cases(names, [64, 16], TINY, Ways([1, 8], dtypes, backward=True, compiled=True))
    assert len(cases) == len(set(cases)) == 2 * 2 * 2 * 2 * 2 * 2
    assert cases[0].size == 16, "short cases come first"
    plain = operator_cases(["linear"], [16], TINY, Ways())
    assert [(one.backward, one.compiled) for one in plain] == [(False, False)]


@pytest.mark.parametrize("name", ["liner", "linear(windw=3)", "kernel(feature=rellu)", "no operator"])
def test_mistakes_are_found_before_anything_is_measured(name: str) -> None:
    with pytest.raises(ConfigError, match="plan"):
        operator_cases(["linear", name], [16], TINY, Ways())


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_own_and_counted_multiply_adds_agree(name: str) -> None:
    """Save for a few sums over elements, which torch's counter does not see."""
    layer = Layer(heads=1, head_dim=64, prefix=1)
    measured = measure_operator(case(name, size=256), layer, repeats=2)
    assert measured.counted_macs == pytest.approx(measured.macs, rel=0.1, abs=4 * 257 * 64)
    assert measured.peak_bytes > 0
    assert 0 < measured.low <= measured.median <= measured.high
    assert measured.softmax > 0


@pytest.fixture
def time_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second for each of its multiply-adds, on whatever machine."""

    def timed(steps: Mapping[str, Step], *_: object) -> dict[str, Timing]:
        return {name: Timing(*[float(counted_macs(step))] * 3) for name, step in steps.items()}

    monkeypatch.setattr(measuring, "time_steps", timed)


@pytest.mark.usefixtures("time_is_work")
def test_the_batch_and_the_backward_pass_are_measured() -> None:
    layer = Layer(heads=2, head_dim=32)
    one, many = (measure_operator(case(size=256, batch=batch), layer, 2) for batch in (1, 32))
    assert many.low == 32 * one.low
    assert many.macs == one.macs, "multiply-adds are of one image"
    both = measure_operator(case(size=256, batch=32, backward=True), layer, 2)
    assert both.low == pytest.approx(3 * many.low, rel=0.02), "each product has two gradients"
    assert both.peak_bytes > many.peak_bytes


@pytest.mark.usefixtures("time_is_work")
def test_an_operator_is_held_against_softmax_at_the_same_work() -> None:
    layer = Layer(heads=2, head_dim=32)
    assert measure_operator(case("softmax", size=256), layer, 2).ratio == 1
    linear = measure_operator(case("linear", size=256), layer, 2)
    assert linear.ratio == pytest.approx(256 / 32, rel=0.1)
