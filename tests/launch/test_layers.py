"""`graftvit layers`, as typed."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.launch.cli import main
from graftvit.models.conversion import convert
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, make_teacher


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    teacher = make_teacher(tmp_path / "teacher")
    student = convert(timm.create_model(f"local-dir:{teacher}", pretrained=True), "*: linear")
    arguments = {**ARGUMENTS, "num_classes": 10}
    write_student(
        student,
        tmp_path / "student",
        architecture=ARCHITECTURE,
        model_args=arguments,
        preprocessing=Preprocessing.of(student, mean=(0.5,), std=(0.5,)),
    )
    return str(tmp_path / "student"), f"local-dir:{teacher}"


def test_the_table_ends_at_the_teacher(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = folders
    words = [
        "layers",
        student,
        "--teacher",
        teacher,
        "--keep",
        "2",
        "--dataset",
        "digits",
        "--batch_size",
        "8",
    ]
    assert main([*words, "--workers", "0"]) == 0
    header, none, first, second, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["kept", "error"]
    errors = [float(line.split()[1]) for line in (none, first, second)]
    assert errors[0] > errors[1] > errors[2] == 0
    assert none.endswith("*: linear")
    assert second.endswith("*: softmax")
    tokens, heads, width = 5, 2, 8
    assert second.split()[2] == f"{2 * 2 * tokens**2 * width * heads:,}"


def test_mistakes(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = folders

    def refused(*words: str) -> str:
        assert main(["layers", *words]) == 2
        return capsys.readouterr().err

    digits = ("--dataset", "digits", "--workers", "0")
    assert "--teacher is missing" in refused(student, *digits)
    assert "keep=9: the student has 2 converted layers" in refused(
        student, "--teacher", teacher, "--keep", "9", *digits
    )
    assert "--batches: give a whole number" in refused(
        student, "--teacher", teacher, "--batches", "0", *digits
    )
