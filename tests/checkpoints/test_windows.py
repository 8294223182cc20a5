"""The windows that config.json gives a Swin are held against its tables of relative position biases."""

from __future__ import annotations

import json
from pathlib import Path

import graftvit
import pytest
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load_weights
from graftvit.checkpoints.student import write_student
from graftvit.models.conversion import convert
from graftvit.models.errors import CheckpointError
from support.models.pyramids import TINY, arguments, tiny


@pytest.fixture(params=[None, "stage1: linear", "stage2: softmax"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Swin with windows of 3x3, as it is or converted in part."""
    model = tiny("swin")
    student = model if request.param is None else convert(model, request.param, without=["bias"])
    shown = Preprocessing.of(model, input_size=(3, 32, 32))
    out = tmp_path / "student"
    write_student(
        student, out, architecture=TINY["swin"][0], model_args=arguments("swin"), preprocessing=shown
    )
    return out


def edit(folder: Path, window: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model_args"]["window_size"] = window
    path.write_text(json.dumps(config))


def test_an_edited_window_is_refused(folder: Path) -> None:
    edit(folder, 2)
    words = r"says window_size=2, but layers\.\d\.blocks\.0\.attn\.relative_position_bias_table has 25 rows"
    with pytest.raises(CheckpointError, match=f"{words} and not 9: its windows are 3x3"):
        graftvit.load(folder)
    with pytest.raises(CheckpointError, match=words):
        load_weights(tiny("swin"), f"local-dir:{folder}")


def test_other_windows_and_sizes_can_be_asked_for(folder: Path) -> None:
    graftvit.load(folder)
    for size in (48, (40, 24)):
        graftvit.load(folder, img_size=size)
    graftvit.load(folder, model_args={"window_size": 4})
