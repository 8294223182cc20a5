"""`graftvit layers`, as typed."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from graftvit.models.conversion import convert
from support.models.saved import save_model
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, make_teacher
from support.runs.typed import Typed


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    teacher = f"local-dir:{make_teacher(tmp_path / 'teacher')}"
    student, arguments = (
        convert(timm.create_model(teacher, pretrained=True), "*: linear"),
        {**ARGUMENTS, "num_classes": 10},
    )
    save_model(tmp_path / "student", student, ARCHITECTURE, arguments, mean=(0.5,), std=(0.5,))
    return str(tmp_path / "student"), teacher


def test_the_table_ends_at_the_teacher(folders: tuple[str, str], typed: Typed) -> None:
    student, teacher = folders
    line = f"layers {student} --teacher {teacher} --keep 2 --dataset digits --batch_size 8 --workers 0"
    header, none, first, second, *_ = typed(line).out.splitlines()
    assert header.split()[:2] == ["kept", "error"]
    errors = [float(line.split()[1]) for line in (none, first, second)]
    assert errors[0] > errors[1] > errors[2] == 0
    assert none.endswith("*: linear")
    assert second.endswith("*: softmax")
    tokens, heads, width = 5, 2, 8
    assert second.split()[2] == f"{2 * 2 * tokens**2 * width * heads:,}"
