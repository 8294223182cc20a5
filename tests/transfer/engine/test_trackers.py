"""Trackers."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine import runlog as trackers
from graftvit.transfer.engine.resume_check import settings
from graftvit.transfer.engine.runlog import create_trackers, hyperparameters
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_what_came_after_the_resumed_step_is_dropped(tmp_path: Path) -> None:
    Accelerator(cpu=True)  # trackers ask accelerate which process they are in
    for start, value in ((0, 1.0), (2, 5.0)):
        (tracker,) = create_trackers(("tensorboard",), tmp_path, "id", start)
        for step in range(start + 1, 5):
            tracker.log({"train_loss": value}, step=step)
        tracker.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 5.0),
        (4, 5.0),
    ]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "is_wandb_available", lambda: False)
    with pytest.raises(ConfigError, match=r"wandb, which is not installed: pip install 'graftvit\[wandb\]'"):
        create_trackers(("wandb",), tmp_path, "id", 0)


def test_hyperparameters_are_flat_scalars() -> None:
    flat = hyperparameters(settings(RunConfig()), peak_lr=0.5)
    assert flat["peak_lr"] == 0.5
    assert flat["optim.blr"] == 1e-3
    assert flat["mode"] == "transfer"
    assert all(isinstance(value, int | float | str | bool) for value in flat.values())


def test_a_tracker_that_does_not_start_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unknown(GeneralTracker):
        name = "wandb"
        requires_logging_directory = False
        tracker = None

        def start(self) -> None:
            raise RuntimeError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(trackers, "is_wandb_available", lambda: True)
    monkeypatch.setattr(trackers, "WandBTracker", lambda *args, **words: Unknown())
    with pytest.raises(ConfigError, match=r"trackers=wandb does not start \(No API key.* WANDB_MODE=offline"):
        trackers.create_trackers(("wandb",), tmp_path, "id", 0)
