"""Time that goes by waiting: for the loader, and for other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graftvit.checkpoints.json_lines import read_records
from graftvit.transfer.data.loaders import EvalLoader
from graftvit.transfer.data.loading import TrainBatches
from graftvit.transfer.engine.loop import Loop
from graftvit.transfer.engine.train import train
from graftvit.transfer.engine.waiting import CommunicationTimer
from support.runs.engine_runs import config
from support.runs.scenarios import RunScenario
from torch import nn


def timed(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(folder / "log.jsonl") if "seconds" in record]


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that stands still but for what this adds to it."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def add(seconds: float) -> None:
        now[0] += seconds

    return add


def slowed(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, before: Callable[[], None]) -> None:
    real = getattr(owner, name)

    def slow(self: Any, *arguments: Any) -> Any:
        before()
        return real(self, *arguments)

    monkeypatch.setattr(owner, name, slow)


def test_time_of_the_loader_is_told_from_that_of_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pass_time: Callable[[float], None]
) -> None:
    slowed(monkeypatch, TrainBatches, "__getitem__", lambda: pass_time(0.3))
    slowed(monkeypatch, Loop, "_step", lambda: pass_time(0.1))
    train(config(tmp_path, optim={"max_steps": 6}))
    for record in timed(tmp_path):
        assert record["data_wait"] == pytest.approx(0.75, abs=0.01)
        assert "comm_wait" not in record


def test_looking_at_the_test_set_is_no_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pass_time: Callable[[float], None]
) -> None:
    slowed(monkeypatch, EvalLoader, "__iter__", lambda: pass_time(0.5))
    slowed(monkeypatch, Loop, "_step", lambda: pass_time(0.1))
    train(config(tmp_path, optim={"epochs": 1}, engine={"log_interval": 3}))
    assert {record["data_wait"] for record in timed(tmp_path)} == {0.0}


@pytest.mark.slow
def test_a_slow_process_is_what_the_others_wait_for(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("engine_waits", tmp_path / "run", 0.1)
    assert report["ends"] == [0, 0]
    steps = [record["step"] for record in report["log"] if "comm_wait" in record]
    assert steps == [2, 2, 4, 4, 6, 6], "an interval and an epoch end at each"
    assert all(0 < record["comm_wait"] <= 1 for record in report["log"] if "comm_wait" in record)


def test_without_ddp_there_is_nothing_to_read() -> None:
    assert CommunicationTimer(nn.Linear(2, 2), 5).seconds() is None


class Timed(nn.Module):
    """What DDP says after each of some steps."""

    def __init__(self, said: list[dict[str, int]]) -> None:
        super().__init__()
        self.said = said
        self.rate = 0

    def _get_ddp_logging_data(self) -> dict[str, int]:
        return self.said.pop(0)

    def _set_ddp_runtime_logging_sample_rate(self, rate: int) -> None:
        self.rate = rate


def test_each_step_that_ddp_timed_counts_once() -> None:
    keys = ("iteration", "backward_comm_time", "backward_compute_comm_overlap_time")
    said = [
        (1, 5_000_000, 2_000_000),
        (1, 5_000_000, 2_000_000),
        (7, 1_000_000, 1_500_000),
        (9, 4_000_000, 0),
    ]
    model = Timed([{"iteration": 0}, *(dict(zip(keys, row, strict=True)) for row in said)])
    timer = CommunicationTimer(model, 7)
    assert model.rate == 7
    assert [timer.seconds() for _ in range(5)] == [None, pytest.approx(3e-3), None, 0.0, pytest.approx(4e-3)]
