"""A run that no longer gets better ends, and one that is continued with more patience goes further."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from graftvit.checkpoints import load
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine import loop
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.runlog import peak_memory
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config, differences, records

SCORES = (10.0, 30.0, 20.0, 30.0, 25.0, 40.0, 5.0, 5.0, 5.0)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations of a run that give `SCORES`, whichever process of the run asks."""

    def score(parts: object, average: object, accelerator: object) -> dict[str, float]:
        epoch = scored_run[0].position.epoch
        return {"test_top1": SCORES[epoch], "test_loss": 1.0}

    scored_run: list[loop.Loop] = []
    evaluate = loop.Loop._evaluate

    def noted(self: loop.Loop, record: dict[str, float]) -> bool:
        scored_run[:] = [self]
        return evaluate(self, record)

    monkeypatch.setattr(loop, "score", score)
    monkeypatch.setattr(loop.Loop, "_evaluate", noted)


def patient(folder: Path, patience: int | None, epochs: int = 9) -> RunConfig:
    return config(folder, engine={"patience": patience}, optim={"epochs": epochs, "ema": None})


@pytest.mark.usefixtures("scored")
@pytest.mark.parametrize(
    ("patience", "epochs", "best"), [(1, 3, 30.0), (2, 4, 30.0), (3, 5, 30.0), (4, 9, 40.0)]
)
def test_a_run_ends_after_so_many_evaluations_that_are_no_better(
    tmp_path: Path, patience: int, epochs: int, best: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = train(patient(tmp_path / "run", patience))
    assert result.finished
    assert result.metrics["best_top1"] == best
    assert [record["test_top1"] for record in records(tmp_path / "run") if "test_top1" in record] == list(
        SCORES[:epochs]
    )
    assert (f"{patience} evaluation{'s' * (patience > 1)} without a better value" in caplog.text) == (
        epochs < 9
    )
    assert (tmp_path / "run" / "student").is_dir()


@pytest.mark.usefixtures("scored")
def test_a_run_that_ended_early_is_continued_with_more_patience(tmp_path: Path) -> None:
    train(patient(tmp_path / "cut", 1))
    assert train(patient(tmp_path / "cut", 1)).steps == 24  # still ended
    assert train(patient(tmp_path / "cut", 4)).metrics["best_top1"] == 40.0
    train(patient(tmp_path / "whole", 4))
    assert differences_without_average(tmp_path / "whole", tmp_path / "cut") == []


def differences_without_average(one: Path, other: Path) -> list[str]:
    for folder in (one, other):  # these runs have no moving average
        (folder / "student_ema").mkdir()
        (folder / "student_ema" / "model.safetensors").touch()
    return differences(one, other)


def test_patience_without_evaluations_is_refused(tmp_path: Path) -> None:
    run = config(tmp_path / "run", engine={"patience": 2}, data={"val_split": None})
    for start in (lambda: dry_run(run, 1, here=True), lambda: train(run)):
        with pytest.raises(ConfigError, match=r"engine.patience needs evaluations with a metric"):
            start()


def test_the_log_holds_the_peak_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    assert peak_memory(torch.device("cuda", 0)) == {"peak_memory_gib": 1.5}
    assert peak_memory(torch.device("cpu")) == {}


def test_a_run_keeps_its_newest_states(tmp_path: Path) -> None:
    run = config(tmp_path / "run", engine={"keep_states": 2, "save_every": 3}, optim={"max_steps": 9})
    assert train(run).finished
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert names == ["step-00000006.safetensors", "step-00000009.safetensors"]
    model = load(tmp_path / "run" / "checkpoints" / names[0])
    assert model.num_classes == 10
