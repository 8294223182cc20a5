"""Runs whose operators are fitted before the first step: on the teacher's inputs or on the student's own, once."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import graftvit
import pytest
import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.launch.plan_text import describe_plan
from graftvit.models.attention.hash import HashAttention
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.errors import UnsupportedModelError
from graftvit.transfer.data.survey import sample_images
from graftvit.transfer.engine import early_signals
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, config, state

PLAN = "*: hash(anchors=5, bits=4)"


def hashed(output_dir: Path, teacher: Path | None, **student: Any) -> Any:
    student = {"plan": PLAN, "calibrate": 9, **student}
    made = {"model": ARCHITECTURE, "model_args": ARGUMENTS, "drop_path": 0.0, **student}
    how = {} if teacher is None else {"transfer": {"method": "attention_output"}}
    return config(output_dir, teacher, student=made, **how)


def codes_of(folder: Path) -> dict[str, torch.Tensor]:
    found = state(folder)
    return {name: tensor for name, tensor in found.items() if ".operator." in name and "student" in name}


def test_a_student_of_its_teacher_is_fitted_to_the_teachers_inputs(teacher: Path, tmp_path: Path) -> None:
    run = hashed(tmp_path / "run", teacher, init="teacher")
    assert train(run).finished
    source = load_pretrained(f"local-dir:{teacher}")
    images = sample_images(run.data, source.preprocessing, 9, seed=run.seed)
    wanted = convert(source.model, PLAN, calibration=images, seed=run.seed)
    found = codes_of(tmp_path / "run")
    assert len(found) == 2 * 4  # with the mark of the operator
    for index, layer in converted_layers(wanted).items():
        for name, tensor in layer.operator.state_dict().items():
            [own] = [value for key, value in found.items() if key.endswith(f"{index}.attn.operator.{name}")]
            torch.testing.assert_close(own, tensor)
    assert graftvit.load(str(tmp_path / "run" / "student"))(images).isfinite().all()
    assert (tmp_path / "run" / "fit" / "layer01.safetensors").exists()


def test_a_fresh_student_is_fitted_to_its_own_inputs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert train(hashed(tmp_path, None)).finished
    assert "fit of layer 1 on 9 images: objective " in caplog.text
    assert all(tensor.any() for tensor in codes_of(tmp_path).values())
    assert not (tmp_path / "fit").exists()


@pytest.mark.parametrize("start", [None, "teacher"])
def test_a_run_without_a_fit_is_refused_and_so_is_its_dry_run(
    start: str | None, teacher: Path, tmp_path: Path
) -> None:
    run = hashed(tmp_path, teacher, calibrate=0, init=start)
    for begin in (train, describe_plan):
        with pytest.raises(UnsupportedModelError, match=r"student\.calibrate=N"):
            begin(run)


def test_a_student_that_was_fitted_needs_no_second_fit(tmp_path: Path) -> None:
    train(hashed(tmp_path / "first", None))
    again = hashed(tmp_path / "again", None, calibrate=0, init=str(tmp_path / "first" / "student"))
    assert "hash" in describe_plan(again)
    assert train(again).finished


def test_a_resumed_run_is_not_fitted_again(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the bits of a run that was never interrupted."""
    how = {"engine": {"save_every": 5}}
    for name in ("whole", "cut"):
        run = hashed(tmp_path / name, teacher, init="teacher")
        train(run.model_copy(update={"engine": run.engine.model_copy(update=how["engine"])}))
    (tmp_path / "cut" / "checkpoints" / "last.safetensors").unlink()
    monkeypatch.setattr(HashAttention, "fit", None)
    run = hashed(tmp_path / "cut", teacher, init="teacher")
    assert train(run.model_copy(update={"engine": run.engine.model_copy(update=how["engine"])})).finished
    whole, cut = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


def test_a_stop_during_the_fit_keeps_the_layers_that_are_fitted(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, fits = HashAttention.fit, list[int]()

    def stopping(self: HashAttention, *given: Any, **named: Any) -> Any:
        fits.append(named["seed"])
        if len(fits) == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return fit(self, *given, **named)

    train(hashed(tmp_path / "whole", teacher, init="teacher"))
    monkeypatch.setattr(HashAttention, "fit", stopping)
    ended = train(hashed(tmp_path / "cut", teacher, init="teacher"))
    assert (ended.signal, ended.steps, len(fits)) == (signal.SIGUSR2, 0, 1)
    early_signals.received.clear()
    assert train(hashed(tmp_path / "cut", teacher, init="teacher")).finished
    assert len(fits) == len(set(fits)) == 2, "no layer is fitted twice"
    whole, cut = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


@pytest.mark.slow
def test_every_process_has_the_fit_of_the_first(run_scenario: Any, tmp_path: Path) -> None:
    """Also where another one rounds differently; and the number of processes does not matter."""
    report = run_scenario("engine_fitting", str(tmp_path))
    assert report["ends"] == [0, 0, 0], report["stderr"]
    assert len(report["fits"]) == 3
    assert len(set(report["fits"])) == 1
