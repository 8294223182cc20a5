"""The states of sharded runs: whole or not at all, and the same on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs.scenarios import NEEDS_FSDP, RunScenario

pytestmark = [NEEDS_FSDP, pytest.mark.slow]


def test_a_state_is_the_same_on_other_numbers_of_ranks(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("sharded_states", "ranks", tmp_path, 8)
    assert report["codes"] == [[0] * 8, [0] * 4, [0]], report["stderr"]
    assert report["kinds"] == ["last", "last.safetensors"]
    assert report["names"] == ["best", "last.safetensors", "previous"]


def test_a_rank_that_is_killed_while_it_writes_leaves_the_state_before(
    run_scenario: RunScenario, tmp_path: Path
) -> None:
    report = run_scenario("sharded_states", "killed", tmp_path)
    assert report["ends"][1] == -9, report["stderr"]
    assert report["ends"][0] not in (0, -9), report["stderr"]
    assert "incoming" in report["names"]
    assert report["steps"] == [3, 3]
    assert report["last"] == [0, 0], report["stderr"]
    assert report["differences"] == []


def test_a_student_made_in_rows_is_bit_for_bit_one_that_each_rank_makes_whole(
    run_scenario: RunScenario, tmp_path: Path
) -> None:
    report = run_scenario("sharded_states", "made", tmp_path)
    assert report["codes"] == [0] * 8, report["stderr"]
    assert report["differences"] == {"fresh": [], "started": []}
    assert all(0.3 < share < 0.7 for shares in report["shares"].values() for share in shares), report
