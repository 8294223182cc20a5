"""docs/dense.md shows the stored results of `python -m benchmarks.dense_recovery`, which bear out what it says."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import dense_recovery as benchmark

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    results: dict[str, Any] = benchmark.results()
    return results


@pytest.mark.parametrize("part", sorted(benchmark.TABLES))
def test_the_page_has_the_table_of_the_results(part: str, found: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "dense.md").read_text()
    assert f"<!-- {part} -->\n{benchmark.TABLES[part](found[part])}\n<!-- end -->" in page


def test_heads_from_scratch_reach_what_they_reached(found: dict[str, Any]) -> None:
    least = {"RetinaNet": ("box_ap", 0.35), "Mask R-CNN": ("mask_ap", 0.3), "Semantic FPN": ("miou", 0.45)}
    rows = {row["head"]: row for row in found["scratch"]}
    assert all(rows[head][score] >= number for head, (score, number) in least.items())
    assert all(row["cpu_seconds"] <= 240 for row in rows.values())


def test_each_seed_recovered_something_and_more_than_fresh_weights_reach(found: dict[str, Any]) -> None:
    scores = [row["box_ap"] for row in found["recovery"]]
    assert len(scores) == 3
    assert all(row["recovered"] > row["converted"] > row["fresh"] for row in scores)


def test_linear_attention_was_faster(found: dict[str, Any]) -> None:
    for row in found["latency"]:
        assert statistics.median(each["softmax"] / each["linear"] for each in row["rounds"]) > 1, row[
            "detector"
        ]
