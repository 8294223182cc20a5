"""The demo from end to end with a handful of steps: its report, and what an interruption or a failure leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.models.errors import ConfigError, GraftError
from graftvit.transfer import cells as pool
from graftvit.transfer.analysis import demo, demo_cells
from graftvit.transfer.analysis.demo import Board
from graftvit.transfer.analysis.demo_cells import Cell
from graftvit.transfer.analysis.report.tables import Table
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.runlog import WALL_CLOCK
from support.files.data_sets import write_fashion
from support.runs.patience import until

SHORT = {
    "optim": {"max_steps": 4, "epochs": 100, "warmup_epochs": 1},
    "engine": {"save_every": 1, "log_interval": 1},
    "student": {"model_args": {"embed_dim": 8, "num_heads": 2}},
}
DECODER = {"pretrain": {"decoder_dim": 8, "decoder_heads": 2}}
SCORED = {"engine": {"eval_every": 2}}


OTHERS: list[BaseProcess] = []


@pytest.fixture(autouse=True)
def _others() -> None:
    """The processes of other tests of this worker, such as a small hub."""
    OTHERS[:] = multiprocessing.active_children()


def cell_processes() -> list[BaseProcess]:
    return [process for process in multiprocessing.active_children() if process not in OTHERS]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = demo_cells.recipe

    def short(name: str, folder: Path, changes: Mapping[str, Any]) -> RunConfig:
        left = {key: value for key, value in changes.items() if key != "optim"}
        own = DECODER if name == "digits_pretrain" else SCORED
        return plain(name, folder, demo_cells._merged(demo_cells._merged(SHORT, own), left))

    monkeypatch.setattr(demo_cells, "recipe", short)


def records(folder: Path) -> dict[str, list[dict[str, float]]]:
    """The logs of all runs, without the clock."""
    return {
        log.parent.name: [
            {key: value for key, value in json.loads(line).items() if key not in WALL_CLOCK}
            for line in log.read_text().splitlines()
        ]
        for log in folder.rglob("log.jsonl")
    }


def at_each_look(monkeypatch: pytest.MonkeyPatch, act: Callable[[Collection[Cell]], None]) -> None:
    """`act` gets the running cells each time the demo looks at them."""
    look = Board.look

    def looked(self: Board, running: Collection[Cell]) -> None:
        look(self, running)
        act(running)

    monkeypatch.setattr(Board, "look", looked)


@pytest.mark.slow
def test_stopped_and_started_again_it_ends_as_if_nothing_had_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(demo, "write_report", lambda _, folder: folder / "report.html")
    report = demo.run_demo(tmp_path / "whole", seeds=(5,), processes=8)  # students wait for their teacher
    out = capsys.readouterr().out
    assert out.startswith("8 cells; 8 at a time, ")
    assert "cell 8 of 8, " in out
    assert "Attention distillation" in out
    assert torch.get_num_threads() == threads
    whole = records(tmp_path / "whole")
    assert len(whole) == 8

    monkeypatch.setattr(demo, "measure", lambda *_: None)  # once is enough
    monkeypatch.setattr(demo, "accuracy_table", lambda _: Table(["method"], []))
    with monkeypatch.context() as few:
        few.setattr(demo_cells, "TEACHERS", {"supervised": "digits_teacher"})
        few.setattr(demo_cells, "STUDENTS", (("scratch", None), ("copy", "supervised")))
        with few.context() as patch:
            at_each_look(
                patch, lambda running: os.kill(os.getpid(), signal.SIGINT) if len(running) < 2 else None
            )
            with pytest.raises(GraftError, match=r"SIGINT with \d of 3 cells.*same command") as stopped:
                demo.run_demo(tmp_path / "broken", seeds=(5,), processes=2, progress=False)
        assert stopped.value.exit_code == 130
        assert cell_processes() == []
        demo.run_demo(tmp_path / "broken", seeds=(5,), processes=1, progress=False)
    broken = records(tmp_path / "broken")
    assert broken == {name: whole[name] for name in ("teacher_supervised", "scratch_5", "copy_supervised_5")}

    monkeypatch.setattr(pool, "_start", lambda *_: pytest.fail("a finished cell was run again"))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert demo.run_demo(Path("whole"), seeds=(5,), progress=False).resolve() == report
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_it_runs_on_photographs(tmp_path: Path) -> None:
    write_fashion(tmp_path / "images" / "FashionMNIST" / "raw")
    report = demo.run_demo(
        tmp_path / "demo", True, dataset="fashion_mnist", data_path=tmp_path / "images", progress=False
    )
    assert "40 labelled product photographs" in " ".join(report.with_suffix(".md").read_text().split())


@pytest.mark.slow
def test_a_cell_that_fails_is_named_with_its_log_and_the_others_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(name: str, folder: Path, changes: Mapping[str, Any]) -> RunConfig:
        wrong = {"data": {"dataset": "digitz"}} if name == "digits_teacher" else {"optim": {"epochs": 10**6}}
        return plain(name, folder, demo_cells._merged(changes, wrong))

    plain = demo_cells.recipe
    monkeypatch.setattr(demo_cells, "recipe", spoil)
    with pytest.raises(GraftError, match=r"^supervised teacher failed: .*digitz") as failed:
        demo.run_demo(tmp_path, quick=True, processes=2, progress=False)
    assert failed.value.exit_code == 1
    assert "\n" not in str(failed.value)
    log = tmp_path / "quick" / "teacher_supervised" / "output.log"
    assert f"(log: {log})" in str(failed.value)
    assert log.exists()
    assert cell_processes() == []


@pytest.mark.slow
def test_a_cell_that_is_killed_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(running: Collection[Cell]) -> None:
        for process in cell_processes():
            process.kill()

    at_each_look(monkeypatch, kill)
    with pytest.raises(GraftError, match=r"teacher failed: it was ended by SIGKILL \(log: "):
        demo.run_demo(tmp_path, quick=True, processes=2, progress=False)
    assert cell_processes() == []


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(running: Collection[Cell]) -> None:
        raise KeyboardInterrupt

    at_each_look(monkeypatch, impatient)
    with pytest.raises(GraftError, match=r"[0-2] of 8 cells") as stopped:
        demo.run_demo(tmp_path, quick=True, processes=2, progress=False)
    assert stopped.value.exit_code == 130
    assert cell_processes() == []


ENDLESS = """
import sys
from pathlib import Path
from graftvit.transfer.analysis import demo as run
from graftvit.transfer.analysis import demo_cells as cells
plain = cells.recipe
cells.recipe = lambda name, folder, changes: plain(name, folder, {**changes, "optim": {"epochs": 10**6}})
run.run_demo(Path(sys.argv[1]), quick=True, processes=1, progress=False)
"""


@pytest.mark.slow
def test_no_cell_outlives_a_demo_that_is_killed(tmp_path: Path) -> None:
    teacher = tmp_path / "quick" / "teacher_supervised"
    with subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)]) as endless:
        until((teacher / "log.jsonl").exists, "the first cell has begun")
        pid = json.loads((teacher / "fence.json").read_text())["pid"]
        endless.kill()
    until(lambda: not (teacher / "fence.json").exists(), "the cell has given up its run")
    until(lambda: not alive(pid), "the cell's process is gone")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_link_leads_no_cell_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "quick").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match=r"leads out of \S*demo by a link: remove the link"):
        demo.run_demo(tmp_path / "demo", quick=True, progress=False)
    assert not list((tmp_path / "victim").iterdir())


@pytest.mark.parametrize(
    "wrong", [{"processes": 0}, {"threads": 0}, {"seeds": (3, -1)}, {"seeds": (3, 4, 3)}], ids=str
)
def test_numbers_that_cannot_be_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    (name,) = wrong
    with pytest.raises(GraftError, match=f"--{name} .*must be"):
        demo.run_demo(tmp_path, **wrong)
