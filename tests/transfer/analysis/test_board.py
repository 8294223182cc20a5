"""What the demo says while it runs, cell by cell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from graftvit.transfer.analysis import demo as module
from graftvit.transfer.analysis.demo import Board
from graftvit.transfer.analysis.demo_cells import Cell, demo_cells
from graftvit.transfer.cells import Ending, save_record


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def log(cell: Cell, step: int) -> None:
    cell.folder.mkdir(parents=True, exist_ok=True)
    record = {"epoch": step - 1, "step": step, "n_parameters": 1, "test_top1": 92.4}
    (cell.folder / "log.jsonl").write_text(json.dumps(record) + "\n")


def test_the_time_left_is_the_work_left_at_the_speed_so_far(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PRIOR", 0.001)
    cells = [replace(cell, seconds=30.0) for cell in demo_cells(tmp_path, (3,), quick=False)[2:6]]
    said: list[str] = []
    board = Board(cells, 2, said.append)
    log(cells[0], 150)
    clock.now = 600.0  # half a cell, alone: 40 times as slow as its 30 seconds
    board.look(cells[:1])
    log(cells[0], 300)
    clock.now = 1200.0
    board.look(cells[:1])
    board.finish(cells[0])
    assert said == [
        "4 cells; 2 at a time, about 1 min left",
        "0 of 4 cells finished; running: scratch seed 3 (50 %), about 35 min left",  # 40 x 105 / 2 seconds
        "0 of 4 cells finished; running: scratch seed 3 (100 %), about 30 min left",
        "cell 1 of 4, scratch seed 3: 92.4 %, about 30 min left",
    ]


def test_the_last_cell_takes_no_less_than_its_own_time(tmp_path: Path) -> None:
    (cell,) = (replace(cell, seconds=600.0) for cell in demo_cells(tmp_path, (0,), quick=False)[:1])
    said: list[str] = []
    Board([cell], 16, said.append).finish(cell)
    assert said == [
        "1 cells; 16 at a time, about 10 min left",
        "cell 1 of 1, supervised teacher: finished",
    ]


def test_a_student_waits_for_its_teacher(tmp_path: Path) -> None:
    teacher, _, _, student = demo_cells(tmp_path, (0,), quick=False)[:4]
    said: list[str] = []
    Board([replace(teacher, seconds=240.0), replace(student, seconds=360.0)], 16, said.append)
    assert said == ["2 cells; 16 at a time, about 10 min left"]


def test_silence_is_broken_now_and_then_only(tmp_path: Path, clock: Clock) -> None:
    cells = demo_cells(tmp_path, (0,), quick=False)
    for cell in cells[:2]:
        save_record(Ending(cell.settings), cell.folder)
    said: list[str] = []
    board = Board(cells, 6, said.append)
    for _ in range(60):
        clock.now += 1.0
        board.look(cells[2:])
    first, *rest = said
    assert first.startswith("8 cells, 2 of them finished before; 6 at a time, ")
    assert len(rest) == 60 / module.LINE_EVERY
    assert all(line.count("(0 %)") == 6 and ", about " in line for line in rest)


def test_work_of_an_earlier_session_is_no_speed_of_this_one(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PRIOR", 1.0)
    cells = [replace(cell, seconds=60.0) for cell in demo_cells(tmp_path, (0,), quick=False)[2:4]]
    log(cells[0], 270)
    said: list[str] = []
    board = Board(cells, 1, said.append)
    log(cells[0], 300)
    clock.now = 119.0
    board.look(cells[:1])  # 6 seconds of work in 119
    assert said[-1].endswith("about 17 min left")
