"""`graftvit search`, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.launch.cli import main
from hostile import ARCHITECTURE, ARGUMENTS


def test_a_search_prints_its_front_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, **ARGUMENTS)
    shown = Preprocessing.of(model, mean=(0.4,) * 3, std=(0.2,) * 3)
    write_student(
        model, tmp_path / "teacher", architecture=ARCHITECTURE, model_args=ARGUMENTS, preprocessing=shown
    )
    words = ["search", str(tmp_path / "teacher"), "--dataset", "digits", "--images", "4", "--population", "5"]
    assert main([*words, "--generations", "2", "--out", str(tmp_path / "found")]) == 0
    said = capsys.readouterr().out
    assert "generation 2 of 2: 10 programs" in said
    archive = json.loads((tmp_path / "found" / "archive.json").read_text())
    assert archive["evaluated"] == 10
    assert all(each["program"] in said for each in archive["front"])
    assert all(name in said for name in ("softmax", "elu + 1", "values", "attnzero_105"))
    assert main([*words, "--generations", "2", "--out", str(tmp_path / "found")]) == 0
    assert capsys.readouterr().out == said
    assert main([*words, "--generations", "2", "--at_random", "--out", str(tmp_path / "found")]) == 2
    assert "measured with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["teacher", "--out", "x"], "a search needs images: give --data_path FOLDER, or --dataset digits"),
        (
            ["teacher", "--out", "x", "--dataset", "digits", "--population", "0"],
            "--population 0: give a number",
        ),
        (["teacher", "--dataset", "digits"], "--out"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", *words]) == 2
    assert reason in capsys.readouterr().err
