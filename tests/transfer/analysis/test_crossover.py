"""The size from which an operator is faster for good."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from graftvit.transfer.analysis.benchmark import crossover, crossovers
from graftvit.transfer.analysis.benchmark_cases import drifted
from hypothesis import given
from hypothesis import strategies as st
from support.runs.benchmark_rows import row


def test_it_lies_between_on_the_log_log_line() -> None:
    found = crossover([100, 400], [0.5, 2.0])
    assert found.where == ""
    assert found.size == pytest.approx(200)
    assert str(found) == "200"


def test_sizes_may_come_in_any_order() -> None:
    assert crossover([400, 100], [2.0, 0.5]) == crossover([100, 400], [0.5, 2.0])


@pytest.mark.parametrize(
    ("ratios", "text"),
    [([1.1, 2.0, 3.0], "below 100"), ([0.1, 0.2, 0.9], "above 900"), ([2.0, 1.5, 0.9], "above 900")],
)
def test_outside_of_what_was_measured_it_is_a_bound(ratios: list[float], text: str) -> None:
    assert str(crossover([100, 300, 900], ratios)) == text


def test_the_last_crossing_counts() -> None:
    found = crossover([10, 20, 40, 80], [0.5, 1.5, 0.5, 2.0])
    assert 40 < found.size < 80


@given(st.floats(0.3, 3), st.floats(30, 3000))
def test_a_power_law_is_met_exactly(exponent: float, size: float) -> None:
    sizes = [25, 100, 400, 1600, 6400]
    found = crossover(sizes, [(n / size) ** exponent for n in sizes])
    assert found.where or math.isclose(found.size, size, rel_tol=1e-6)


def test_settings_are_kept_apart() -> None:
    rows = [row(size=n, batch=b, ratio=n * b / 200) for n in (50, 800) for b in (1, 2)]
    found = {case.batch: value.size for case, value in crossovers(rows).items()}
    assert found == {1: pytest.approx(200), 2: pytest.approx(100)}
    assert crossovers(rows[:1]) == {}


def test_there_is_none_from_rows_whose_reference_drifted() -> None:
    """The same softmax in 1.28 ms and in 9.71 ms: the machine was busy in one of the two rows."""
    quiet = [row(size=n, ratio=n / 200) for n in (50, 800)]
    others = [
        replace(each, case=replace(each.case, name=name)) for each in quiet for name in ("ttt", "window")
    ]
    busy = replace(quiet[1], softmax=quiet[1].softmax * 7.6)
    assert drifted([*quiet, *others]) == []
    assert drifted([quiet[0], busy, *others]) == [busy]
    found = {case.name for case in crossovers([quiet[0], busy, *others])}
    assert found == {"ttt", "window"}
