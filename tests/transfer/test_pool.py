"""The record of a cell says how far it is; cells run one after another, and not again when they are done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from graftvit.checkpoints.files import digest
from graftvit.models.errors import ConfigError, RunFailedError
from graftvit.transfer import cells
from graftvit.transfer.analysis.demo_cells import demo_cells
from graftvit.transfer.cells import (
    Ending,
    State,
    cell_state,
    left_to_run,
    load_record,
    run_in_processes,
    run_in_turn,
    save_record,
    usable_cores,
)


def test_a_cell_is_begun_with_its_folder_and_ends_with_its_record(tmp_path: Path) -> None:
    cell, settings = tmp_path / "cell", digest({"lr": 1.0})
    assert cell_state(cell, settings) == "to do"
    assert load_record(Ending, cell) is None
    cell.mkdir()
    assert cell_state(cell, settings) == "begun"
    save_record(Ending("other settings", "out of luck"), cell)
    assert cell_state(cell, settings) == "failed"
    save_record(Ending(settings), cell)
    assert cell_state(cell, settings) == "done"
    assert load_record(Ending, cell) == Ending(settings)


def test_a_cell_of_other_settings_is_refused(tmp_path: Path) -> None:
    save_record(Ending(digest({"lr": 1.0})), tmp_path)
    with pytest.raises(ConfigError, match="measured with other settings or another --threads"):
        cell_state(tmp_path, digest({"lr": 2.0}), "settings or another --threads")


@pytest.mark.parametrize("text", ["", "[]", '{"error": null}', '{"settings": 3}'])
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "cell.json").write_text(text)
    with pytest.raises(ConfigError, match=r"cell\.json is no record of a cell"):
        cell_state(tmp_path, "")


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


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


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "quick").write_text("a file")
    demo = demo_cells(tmp_path, (0,), quick=True)[:1]
    with pytest.raises(RunFailedError, match=r"quick/teacher_supervised cannot be written: Not a directory"):
        run_in_processes(demo, 1, look=len, finish=str)


def test_a_process_has_the_cores_that_slurm_the_kernel_and_its_container_grant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(cells, "CONTAINER", tmp_path / "cpu.max")
    assert usable_cores() == 6
    for text, cores in (("max 100000", 6), ("250000 100000", 2), ("20000 100000", 1), ("900000 100000", 6)):
        (tmp_path / "cpu.max").write_text(text)
        assert usable_cores() == cores
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "9")
    assert usable_cores() == 9
