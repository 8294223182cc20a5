"""States by the clock: `engine.save_minutes`, with a clock of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.transfer.engine import run_state
from graftvit.transfer.engine.loop import Loop
from graftvit.transfer.engine.run_state import RunState, SaveClock
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config, differences


class Hand:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(run_state, "now", lambda: self.seconds)


def saved_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let each step take a minute of the test's clock, and return the list that gets the step of each saved state."""
    hand, steps = Hand(monkeypatch), []
    step, save = Loop._step, RunState.save

    def slow(self: Loop, batches: object) -> None:
        step(self, batches)  # type: ignore[arg-type]
        hand.seconds += 60

    def noted(self: RunState, position: object, *, best: bool = False, last: bool = True) -> None:
        save(self, position, best=best, last=last)  # type: ignore[arg-type]
        steps.extend([position.step] if last else [])  # type: ignore[attr-defined]

    monkeypatch.setattr(Loop, "_step", slow)
    monkeypatch.setattr(RunState, "save", noted)
    return steps


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """The folder of a run that saves at the end of each epoch, of eight steps."""
    folder = tmp_path_factory.mktemp("plain")
    train(config(folder, teacher))
    return folder


def test_it_asks_once_when_the_minutes_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(monkeypatch)
    clock, never = SaveClock(2), SaveClock(None)
    hand.seconds = 119
    assert not clock.due()
    hand.seconds = 120
    assert [clock.due(), clock.due()] == [True, False]
    clock.restart()
    hand.seconds = 239
    assert not clock.due()
    hand.seconds = 10_000
    assert clock.due()
    assert not never.due()


@pytest.mark.parametrize(
    ("save_every", "saved"),
    [
        (None, [3, 6, 8, 11, 14, 16]),
        (5, [3, 5, 8, 10, 13, 15, 16]),
        (1000, [3, 6, 9, 12, 15, 16]),
        (7, [3, 6, 7, 10, 13, 14, 16]),
    ],
)
def test_a_run_saves_by_the_clock_and_its_result_is_the_same(
    tmp_path: Path,
    teacher: Path,
    plain: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_every: int | None,
    saved: list[int],
) -> None:
    steps = saved_steps(monkeypatch)
    train(config(tmp_path / "clocked", teacher, engine={"save_every": save_every, "save_minutes": 3}))
    assert steps == saved
    assert differences(plain, tmp_path / "clocked") == []


def test_a_state_that_falls_due_at_the_end_of_an_epoch_is_saved_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = saved_steps(monkeypatch)
    train(config(tmp_path / "run", engine={"save_every": 1000, "save_minutes": 8}, optim={"epochs": 3}))
    assert steps == [8, 16, 24]
