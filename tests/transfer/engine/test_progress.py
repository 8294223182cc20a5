"""The progress bar."""

from __future__ import annotations

import sys

import pytest
from graftvit.transfer.engine.runlog import ProgressBar, numbers

RECORD = {
    "epoch": 0,
    "step": 3,
    "train_loss": 11.98361,
    "train_task": 2.3286,
    "lr": 9.38e-4,
    "images_per_second": 280.2,
}


def test_the_numbers_of_a_record() -> None:
    assert numbers(RECORD) == "loss 11.98  task 2.329  lr 9.38e-04  280 img/s"


@pytest.mark.parametrize(
    ("share", "said"), [(0.1, ""), (0.114, "  11% waiting for data"), (1.0, "  100% waiting for data")]
)
def test_a_wait_for_data_is_said_where_it_is_worth_a_look(share: float, said: str) -> None:
    assert numbers({**RECORD, "data_wait": share}) == numbers(RECORD) + said


def test_many_layers_are_left_to_the_log() -> None:
    layers = {f"train_layer{index:02d}": 1.0 for index in range(12)}
    assert "layer" not in numbers({**RECORD, **layers})
    assert "layer00" in numbers({**RECORD, "train_layer00": 1.0})


@pytest.mark.parametrize(
    ("terminal", "shown", "drawn"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_it_is_drawn_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
    shown: bool,
    drawn: bool,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    with ProgressBar(4, shown=shown, done=1) as bar:
        bar.step(3, 1)
        bar.show(RECORD)
    printed = capsys.readouterr().out
    assert ("3/4" in printed and "280 img/s" in printed) == drawn
