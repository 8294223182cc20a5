"""Rows come back as they were, agree or not by a rule, are merged once each, and rank the proxies."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.cli import main
from graftvit.models.errors import ConfigError
from graftvit.models.programs.program import parse_program
from graftvit.transfer.bench_rows import (
    TOLERANCE,
    Point,
    Row,
    best_first,
    compare_orders,
    disagreement,
    merge_rows,
    rank_proxies,
    read_rows,
    write_rows,
)
from graftvit.transfer.search.matching import SCORES
from graftvit.transfer.search.program_search import PROXIES, SOFTMAX, run_search
from support.runs.search_runs import search, silent

HERE = {"torch": "2", "threads": "1"}
ROW = Row(
    "digest", None, "v", "0123456789abcdef", "values", "plain", "digits", 3, True, "mine", "trained", "",
    (Point(1, 50.2, 1 / 3), Point(2, 100 / 7, 0.1 + 0.2)), 17, 2**40, 0.25, HERE,
)  # fmt: skip
REFUSED = replace(
    ROW, program="mul(q v)", hash="f" * 16, name="", status="refused", reason="mixing: “none”", curve=(),
    parameters=None, macs=None, latency=None, local=False,
)  # fmt: skip


def changed(**values: Any) -> Row:
    return replace(ROW, **values)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_come_back_to_the_last_bit_in_order_of_their_keys(name: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    split = replace(REFUSED, seed=4, reason="one\u2028two\x85three")
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
        curve = (Point(1, 1.0, 1.0), Point(2, 100 / 7 + points, 1.0))
        return changed(environment={"torch": "3"}, curve=curve)

    assert disagreement(ROW, elsewhere(TOLERANCE - 0.01)) == ""
    assert "more than 30 points apart" in disagreement(ROW, elsewhere(TOLERANCE + 0.01))
    assert "macs" in disagreement(ROW, replace(elsewhere(0.0), macs=5))
    overflowed = replace(elsewhere(0.0), status="failed", curve=(), parameters=None, macs=None)
    assert disagreement(ROW, overflowed) == disagreement(overflowed, ROW) == ""
    refused = replace(overflowed, status="refused")
    assert disagreement(ROW, refused) == "it was trained and is now refused"


def test_a_merge_keeps_each_row_once_and_refuses_a_contradiction() -> None:
    again = changed(latency=7.0)
    assert merge_rows([[ROW, REFUSED], [again], [changed(seed=0)]]) == [changed(seed=0), ROW, REFUSED]
    with pytest.raises(ConfigError, match=r"values \(plain, digits, seed 3, with convolution\) do not agree"):
        merge_rows([[ROW], [changed(curve=(Point(1, 0.0, 0.0),))]])
    assert len(merge_rows([[ROW], [changed(settings="other")]])) == 2


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"curve": ' * 10**5,
        '{"curve": ' + "[" * 500 + "]" * 500 + "}",
        '{"curve": [], "parameters": ' + "9" * 5000 + "}",
        "[]",
        '{"curve": 3}',
        '{"curve": [], "status": "lost", "settings": ""}',
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_row_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text + "\n")
    with pytest.raises(ConfigError, match="line 1 is no row of a benchmark"):
        read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rows(tmp_path / "other.jsonl")


PROGRAMS = ("v", "q", SOFTMAX, "k")


def row(program: str, *curve: float, seed: int = 0, backbone: str = "plain") -> Row:
    text = parse_program(program).text
    points = tuple(Point(2 * n, top1, 1.0) for n, top1 in enumerate(curve, 1))
    return Row("digest", program=text, backbone=backbone, data="digits", seed=seed, curve=points)


def test_orders_are_compared_by_rank() -> None:
    """Of the six pairs of 1 2 3 4 and 1 3 2 4, one is in the other order; the squared distances of ranks sum to 2."""
    kendall, spearman, precision = compare_orders([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0], 2)
    assert kendall == pytest.approx(4 / 6)
    assert spearman == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert precision == 0.5
    assert compare_orders([-math.inf, 2.0, 3.0], [5.0, 6.0, 7.0], 1) == pytest.approx((1.0, 1.0, 1.0))


def test_a_proxy_that_orders_as_training_has_correlation_one(tmp_path: Path) -> None:
    """The accuracies are made from the mismatch; two seeds are averaged."""
    found = search(tmp_path)
    error = {text: found.mismatch(parse_program(text)) for text in PROGRAMS}
    assert len(set(error.values())) == len(PROGRAMS)
    rows = [
        row(text, 50 + error[text], 50 - error[text] + shift, seed=seed)
        for text in PROGRAMS
        for seed, shift in ((0, 7.0), (1, -7.0))
    ]
    refused = Row("digest", program="mul(q v)", backbone="plain", data="digits", status="refused")
    by_name = {each.proxy: each for each in rank_proxies(found, [*rows, refused], 1)}
    assert set(by_name) == {*PROXIES, *SCORES, "cost", "first epochs"}
    assert all(each.programs == len(PROGRAMS) for each in by_name.values())
    best = by_name["matching"]
    assert (best.kendall, best.spearman, best.precision) == pytest.approx((1.0, 1.0, 1.0))
    worst = by_name["first epochs"]
    assert (worst.kendall, worst.spearman, worst.precision) == pytest.approx((-1.0, -1.0, 0.0))


def test_shorter_trainings_are_proxies_by_the_name_of_their_recipe(tmp_path: Path) -> None:
    """Programs, models and convolutions that have no short row are left out; the settings of both differ."""
    rows = [row(text, 10.0 * n) for n, text in enumerate(PROGRAMS)]
    kept = {"program": PROGRAMS[3], "recipe": "transfer"}
    short = [
        replace(row(text, -5.0 * n), recipe="transfer", settings="other")
        for n, text in enumerate(PROGRAMS[:3])
    ]
    short += [replace(short[0], **kept, backbone="pyramid"), replace(short[0], **kept, local=False)]
    short += [replace(short[0], program=PROGRAMS[3], recipe="task", status="failed")]
    by_name = {each.proxy: each for each in rank_proxies(search(tmp_path), rows, 1, short)}
    assert "task" not in by_name
    assert (by_name["transfer"].programs, by_name["transfer"].kendall) == (3, pytest.approx(-1.0))
    assert by_name["matching"].programs == len(PROGRAMS)
    with pytest.raises(ConfigError, match="has 3 programs with the proxy transfer"):
        rank_proxies(search(tmp_path), rows, 3, short)


def test_too_few_programs_are_refused(tmp_path: Path) -> None:
    rows = [row(text, accuracy) for text, accuracy in zip(PROGRAMS, (10.0, 20.0, 30.0, 40.0), strict=True)]
    for some, top in ((rows[:2], 1), (rows, 4)):
        with pytest.raises(ConfigError, match="a ranking needs 3 or more, and more than --top"):
            rank_proxies(search(tmp_path), some, top)
    with pytest.raises(ConfigError, match="no trained program"):
        rank_proxies(search(tmp_path), [], 1)


def test_the_page_has_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_search(search(tmp_path / "found"), 1, silent)
    rows = [row(text, 10.0 * n, backbone="small") for n, text in enumerate(PROGRAMS)]
    write_rows(rows, tmp_path / "rows.jsonl")
    words = ["programs", "search", "report", str(tmp_path / "found")]
    assert main([*words, "--rows", str(tmp_path / "rows.jsonl"), "--top", "2"]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "fitted" in line).split()
    assert line[:5] == ["small", "digits", "with", "4", "fitted"]
    write_rows([replace(each, recipe="briefly") for each in rows], tmp_path / "short.jsonl")
    short = ["--short", str(tmp_path / "short.jsonl")]
    assert main([*words, *short]) == 2
    assert "--short needs --rows" in capsys.readouterr().err
    assert main([*words, "--rows", str(tmp_path / "rows.jsonl"), "--top", "2", *short]) == 0
    said = capsys.readouterr().out
    assert " briefly " in said
    page = (tmp_path / "found" / "report.html").read_text()
    assert "<h2>The proxies</h2>" in page
    assert all(f">{word}<" in page for word in line[5:])
    assert main([*words, "--top", "0"]) == 2
    assert "--top: give a whole number, 1 or more, not '0'" in capsys.readouterr().err
    assert main(words) == 0
    assert "The proxies" not in (tmp_path / "found" / "report.html").read_text()
