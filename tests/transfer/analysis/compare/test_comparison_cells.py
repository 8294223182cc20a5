from __future__ import annotations

import pytest
from graftvit.models.errors import ConfigError
from graftvit.transfer.analysis.compare.comparison_cells import (
    CompareConfig,
    Record,
    check_stages,
    list_cells,
    only_named,
)

PLANS = {"linear": "*: linear", "mixed": "*: linear; 0: softmax"}


def test_teacher_and_uniform_come_before_the_plans_at_every_size() -> None:
    cells = list_cells(PLANS, [8, 16], teacher=True)
    assert [cell.folder for cell in cells] == [
        f"{name}-{size}" for size in (8, 16) for name in ("teacher", "uniform", "linear", "mixed")
    ]
    assert [cell.plan for cell in cells[:2]] == [None, "*: uniform"]


def test_without_a_teacher_there_is_no_row_for_one() -> None:
    assert [cell.name for cell in list_cells(PLANS, [8], teacher=False)] == ["uniform", "linear", "mixed"]


@pytest.mark.parametrize("name", ["teacher", "uniform", "a/b", "", "two words", ".."])
def test_names_that_cannot_be_cells_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"compare\.plans"):
        list_cells({name: "*: linear"}, [8], teacher=True)


def test_a_record_of_somebody_else_names_no_other_folder() -> None:
    record = Record("../../victim", "*: linear", 8, "digest", "a machine", 0.0)
    with pytest.raises(ConfigError, match=r"compare\.plans: '\.\./\.\./victim' is no name of a file"):
        record.folder  # noqa: B018


def test_each_student_has_a_cell_for_every_seed() -> None:
    cells = list_cells(PLANS, [8], teacher=True, seeds=[3, 5])
    assert [cell.folder for cell in cells] == [
        "teacher-8",
        *(f"{name}-8-seed{seed}" for name in ("uniform", "linear", "mixed") for seed in (3, 5)),
    ]
    assert [cell.seed for cell in cells[:3]] == [None, 3, 5]
    assert [cell.folder for cell in only_named(cells, ["mixed", "uniform-8-seed5"])] == [
        "uniform-8-seed5",
        "mixed-8-seed3",
        "mixed-8-seed5",
    ]
    with pytest.raises(ConfigError, match=r"compare\.seeds is \[1, 1\]: give each seed once"):
        list_cells(PLANS, [8], teacher=True, seeds=[1, 1])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"linaer": ["align"]}, r"compare\.stages: there is no plan 'linaer'; did you mean 'linear'"),
        ({"linear": ["taks"]}, r"compare\.stages\.linear: there is no stage 'taks'; did you mean 'task'"),
        ({"uniform": []}, r"compare\.stages\.uniform is empty: name one stage or more of align, task"),
    ],
)
def test_stages_of_plans_that_are_not_there_are_refused(stages: dict[str, list[str]], message: str) -> None:
    compare = CompareConfig.model_validate({"plans": PLANS, "stages": stages})
    with pytest.raises(ConfigError, match=message):
        check_stages(compare, ["align", "task"])


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
