"""Aliases: other texts, the same numbers."""

from __future__ import annotations

import pytest
from graftvit.models.programs.program import find_aliases, parse_program


def aliases(*texts: str) -> dict[str, list[str]]:
    return find_aliases(map(parse_program, texts))


def test_texts_that_compute_the_same_are_recorded_under_the_first() -> None:
    assert aliases("relu(relu(q))", "mul(q k)", "relu(q)", "mul(k q)", "max(q sub(q q))") == {
        "relu(relu(q))": ["relu(q)", "max(q sub(q q))"]
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "l2(zscore(q))",
            "l2(sub(q mean(q)))",
        ),  # the same mean for all heads and channels, and one for each channel
        ("mul(q l2(mm(q tn(k v))))", "mul(q l2(nt(q tn(k v))))"),
        ("scale(q)", "mul(q mul(one one))"),
        ("sqrt(q)", "exp(q)"),
    ],
)
def test_programs_that_differ_are_kept_apart(one: str, other: str) -> None:
    assert aliases(one, other) == {}


def test_simplifications_of_found_programs_are_aliases() -> None:
    """Under the outer norm, the deviation of trial 105's score and the width of its minmax do not matter."""
    shorter = "mul(l2(mm(q zscore(tn(minmax(v) elu1(k))))) q)"
    assert aliases("mul(l2(mm(l2(q) zscore(tn(minmax(v) elu1(k))))) q)", shorter) == {
        "mul(l2(mm(l2(q) zscore(tn(minmax(v) elu1(k))))) q)": [shorter]
    }


def test_nan_agrees_with_nan_alone() -> None:
    zero_by_zero = "sumnorm(sub(q q))"
    assert aliases(zero_by_zero, "q") == {}
    assert aliases(zero_by_zero, "sumnorm(sub(k k))") == {zero_by_zero: ["sumnorm(sub(k k))"]}


def test_the_tolerance_decides() -> None:
    near = [parse_program(text) for text in ("q", "add(q mul(log(one) k))")]
    assert find_aliases(near) == {"q": [near[1].text]}
    assert find_aliases(near, tolerance=1e-12) == {}
