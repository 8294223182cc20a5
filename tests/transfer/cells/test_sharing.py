"""Every cell is run once: by name, by the jobs of an array, and not again when it is done."""

from __future__ import annotations

import pytest
from graftvit.models.errors import ConfigError
from graftvit.transfer.cells.records import State
from graftvit.transfer.cells.sharing import array_share, left_to_run, run_in_turn
from hypothesis import given
from hypothesis import strategies as st


def array(number: int, count: int, first: int = 0, step: int = 1) -> dict[str, str]:
    values = {"ID": number, "COUNT": count, "MIN": first, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 5), st.integers(1, 4))
def test_an_array_covers_every_cell_exactly_once(cells: int, count: int, first: int, step: int) -> None:
    everyone = list(range(cells))
    shares = [
        array_share(everyone, array(first + step * place, count, first, step)) for place in range(count)
    ]
    assert sorted(cell for share in shares for cell in share) == everyone
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_outside_of_an_array_all_cells_are_ours() -> None:
    assert array_share([1, 2, 3], {"SLURM_JOB_ID": "7"}) == [1, 2, 3]


NO_PLACES = [
    array(4, 4),
    array(1, 4, first=2),
    array(3, 4, step=2),
    {"SLURM_ARRAY_TASK_ID": "0"},
    array(0, 4) | {"SLURM_ARRAY_TASK_ID": "x"},
]


@pytest.mark.parametrize("environment", NO_PLACES)
def test_an_array_with_gaps_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK"):
        array_share([1, 2, 3], environment)


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
