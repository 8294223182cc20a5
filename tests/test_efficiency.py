"""docs/efficiency.md, the stored results and the claims of the operators say the same."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from graftvit.models.attention.base import Geometry, LayerShape
from graftvit.models.layer_plan import FASTER_FROM, OPERATORS
from graftvit.transfer.analysis.benchmark import crossover_table, size_table
from graftvit.transfer.analysis.benchmark_cases import SOFTMAX, Results, Row, read_results

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 4096


@pytest.fixture(scope="module")
def results() -> Results:
    return read_results(ROOT / "benchmarks" / "results" / "operators" / "results.json")


def measured(results: Results) -> dict[str, Row]:
    """By name, one image at 4,096 tokens."""
    return {row.case.name: row for row in results.rows if (row.case.size, row.case.batch) == (TOKENS, 1)}


def test_every_claim_was_measured(results: Results) -> None:
    assert set(FASTER_FROM) <= set(measured(results)) <= set(OPERATORS) - {SOFTMAX}
    assert all(row.case.source.endswith("heads of 64") for row in results.rows)
    assert {row.case.batch for row in results.rows} > {1}


def test_the_page_has_the_tables_of_the_results(results: Results) -> None:
    page = (ROOT / "docs" / "efficiency.md").read_text()
    rows = [row for row in results.rows if row.case.size == TOKENS and row.case.batch == 1]
    assert size_table(rows).to_markdown() in page
    assert crossover_table(results).to_markdown() in page
    assert results.machine in page


def test_the_page_marks_who_claims(results: Results) -> None:
    page = (ROOT / "docs" / "efficiency.md").read_text()
    found = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+|none) \|$", page, re.MULTILINE))
    claims = {name: f"{FASTER_FROM[name]:,}" if name in FASTER_FROM else "none" for name in measured(results)}
    assert found == claims


def test_what_was_measured_bears_the_claims_out(results: Results) -> None:
    """At every size from the claimed one on, in every batch that was measured."""
    assert set(FASTER_FROM) <= set(OPERATORS) - {SOFTMAX}
    assert max(FASTER_FROM.values()) <= TOKENS
    for row in results.rows:
        if row.case.size >= FASTER_FROM.get(row.case.name, 2 * TOKENS):
            assert row.ratio > 1.25, f"{row.case}: {row.ratio:.2f}"


def test_operators_of_linear_cost_claim_or_were_measured_to_be_slower(results: Results) -> None:
    shape = LayerShape(1, 64, Geometry(0, (8, 8)))
    rows = measured(results)
    silent = {name for name in set(rows) - set(FASTER_FROM) if OPERATORS[name](shape).traits.linear_cost}
    assert all(rows[name].ratio < 1 for name in silent)


@pytest.mark.parametrize("name", sorted(FASTER_FROM))
def test_a_claim_rests_on_fewer_multiplications(name: str) -> None:
    """What time a machine takes is measured by `make bench`; this holds on each."""
    side = math.isqrt(FASTER_FROM[name])
    shape = LayerShape(1, 64, Geometry(0, (side, side)))
    claimed, softmax = (OPERATORS[each](shape).macs(shape.geometry) for each in (name, SOFTMAX))
    assert claimed < softmax
