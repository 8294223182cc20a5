from __future__ import annotations

import pytest
from graftvit.models.errors import ConfigError
from graftvit.transfer.analysis.compare.comparison_cells import array_share, list_cells, only_named
from hypothesis import given
from hypothesis import strategies as st

PLANS = {"linear": "*: linear", "mixed": "*: linear; 0: softmax"}


def array(number: int, count: int, first: int = 0, step: int = 1) -> dict[str, str]:
    values = {"ID": number, "COUNT": count, "MIN": first, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def test_teacher_and_uniform_come_before_the_plans_at_every_size() -> None:
    cells = list_cells(PLANS, [8, 16], teacher=True)
    assert [cell.folder for cell in cells] == [
        f"{name}-{size}" for size in (8, 16) for name in ("teacher", "uniform", "linear", "mixed")
    ]
    assert [cell.plan for cell in cells[:2]] == [None, "*: uniform"]


def test_without_a_teacher_there_is_no_row_for_one() -> None:
    assert [cell.name for cell in list_cells(PLANS, [8], teacher=False)] == ["uniform", "linear", "mixed"]


@pytest.mark.parametrize("name", ["teacher", "uniform", "a/b", "", "two words"])
def test_names_that_cannot_be_cells_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"compare\.plans"):
        list_cells({name: "*: linear"}, [8], teacher=True)


def test_only_takes_names_and_folders_and_says_what_there_is() -> None:
    cells = list_cells(PLANS, [8, 16], teacher=True)
    assert [cell.folder for cell in only_named(cells, ["linear"])] == ["linear-8", "linear-16"]
    assert [cell.folder for cell in only_named(cells, ["linear-16", "uniform-8"])] == [
        "uniform-8",
        "linear-16",
    ]
    assert only_named(cells, None) == cells
    with pytest.raises(ConfigError, match=r"--only linea.*did you mean 'linear'"):
        only_named(cells, ["linea"])


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
