"""Rows come back as they were, agree or not by a rule, and are merged once each."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from graftvit.models.errors import ConfigError
from graftvit.transfer.attnbench.bench_rows import (
    TOLERANCE,
    Point,
    Row,
    best_first,
    disagreement,
    merge_rows,
    read_rows,
    write_rows,
)

HERE = {"torch": "2", "threads": "1"}
ROW = Row(
    "digest", None, "v", "0123456789abcdef", "values", "plain", "digits", 3, True, "mine", "trained", "",
    (Point(1, 50.2, 1 / 3), Point(2, 100 / 7, 0.1 + 0.2)), 17, 2**40, 0.25, HERE,
)  # fmt: skip
REFUSED = dataclasses.replace(
    ROW, program="mul(q v)", hash="f" * 16, name="", status="refused", reason="mixing: “none”", curve=(),
    parameters=None, macs=None, latency=None, local=False,
)  # fmt: skip


def changed(**values: Any) -> Row:
    return dataclasses.replace(ROW, **values)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_come_back_to_the_last_bit_in_order_of_their_keys(name: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    split = dataclasses.replace(REFUSED, seed=4, reason="one\u2028two\x85three")
    write_rows([REFUSED, ROW, changed(seed=1), split], tmp_path / name)
    assert read_rows(tmp_path / name) == [changed(seed=1), ROW, REFUSED, split]
    write_rows([], tmp_path / "none.jsonl")
    assert read_rows(tmp_path / "none.jsonl") == []


def test_the_score_is_that_of_the_last_epoch() -> None:
    assert ROW.top1 == 100 / 7
    assert REFUSED.top1 is None
    assert changed(status="failed").top1 is None
    assert best_first([REFUSED, ROW, changed(seed=4, curve=(Point(1, 20.0, 1.0),))])[0].seed == 4


def test_in_the_same_environment_every_bit_but_the_latency_is_equal() -> None:
    assert disagreement(ROW, changed(latency=9.0, recipe="other")) == ""
    last = Point(2, 100 / 7, 0.3)
    assert "curves" in disagreement(ROW, changed(curve=(ROW.curve[0], last)))
    assert disagreement(ROW, changed(parameters=18)) == "parameters 17 and 18"
    assert disagreement(ROW, changed(status="failed")) == "it was trained and is now failed"


def test_elsewhere_the_last_score_may_differ_by_the_tolerance() -> None:
    def elsewhere(points: float) -> Row:
        return changed(
            environment={"torch": "3"}, curve=(Point(1, 1.0, 1.0), Point(2, 100 / 7 + points, 1.0))
        )

    assert disagreement(ROW, elsewhere(TOLERANCE - 0.01)) == ""
    assert "more than 30 points apart" in disagreement(ROW, elsewhere(TOLERANCE + 0.01))
    assert "macs" in disagreement(ROW, dataclasses.replace(elsewhere(0.0), macs=5))
    overflowed = dataclasses.replace(elsewhere(0.0), status="failed", curve=(), parameters=None, macs=None)
    assert disagreement(ROW, overflowed) == disagreement(overflowed, ROW) == ""
    assert (
        disagreement(ROW, dataclasses.replace(overflowed, status="refused"))
        == "it was trained and is now refused"
    )


def test_a_merge_keeps_each_row_once_and_refuses_a_contradiction() -> None:
    again = changed(latency=7.0)
    assert merge_rows([[ROW, REFUSED], [again], [changed(seed=0)]]) == [changed(seed=0), ROW, REFUSED]
    with pytest.raises(ConfigError, match=r"values \(plain, digits, seed 3, with convolution\) do not agree"):
        merge_rows([[ROW], [changed(curve=(Point(1, 0.0, 0.0),))]])
    assert len(merge_rows([[ROW], [changed(settings="other")]])) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "line 1 is no row of a benchmark"),
        ('{"curve": ' * 10**5, "line 1 is no row of a benchmark"),
        ('{"curve": ' + "[" * 500 + "]" * 500 + "}", "line 1 is no row of a benchmark"),
        ('{"curve": [], "parameters": ' + "9" * 5000 + "}", "line 1 is no row of a benchmark"),
        ("[]", "line 1 is no row of a benchmark"),
        ('{"curve": 3}', "line 1 is no row of a benchmark"),
        ('{"curve": [], "status": "lost", "settings": ""}', "line 1 is no row of a benchmark"),
    ],
)
def test_a_damaged_row_is_named(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text + "\n")
    with pytest.raises(ConfigError, match=reason):
        read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rows(tmp_path / "other.jsonl")
