"""Cells run one after another, and not again when they are done."""

from __future__ import annotations

from graftvit.transfer.cells.pool import State, left_to_run, run_in_turn


def test_cells_that_are_done_are_left_out_and_each_line_says_where_we_are() -> None:
    states: dict[str, State] = {"a": "done", "b": "failed", "c": "begun", "d": "to do"}
    told: list[str] = []
    left = left_to_run(list(states), states.__getitem__, told.append)
    assert left == ["b", "c", "d"]
    run_in_turn(left, str.upper, told.append)
    assert told[0] == "1 of 4 cells are done"
    assert told[1::2] == ["[1/3] b", "[2/3] c", "[3/3] d"]
    assert [line.partition(";")[0] for line in told[2::2]] == ["    B", "    C", "    D"]
    assert told[-1] == "    D; 0 s to go"
