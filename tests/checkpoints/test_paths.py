"""What a mistyped path is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.checkpoints.paths import near_path


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("runs/techer", "runs/teacher"),
        ("runs/techer/student", "runs/teacher/student"),
        ("rums/teacher/student", "runs/teacher/student"),
        ("rums/other", "runs"),
        ("runs/teachers.yml", "runs/teachers.yaml"),
        ("runs/hiden", ""),
        ("runs/.hiden", "runs/.hidden"),
        ("runs/nothing-like-it", ""),
        ("", ""),
        ("runs/a\0b", ""),
        (f"runs/{'x' * 5000}", ""),
    ],
)
def test_the_nearest_name_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, near: str
) -> None:
    for folder in ("teacher/student", ".hidden"):
        (tmp_path / "runs" / folder).mkdir(parents=True)
    (tmp_path / "runs" / "teachers.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert near_path(typed) == (f"did you mean {near!r}?" if near else "")
    absolute = str(tmp_path / near)
    assert near_path(tmp_path / typed) == (f"did you mean {absolute!r}?" if near else "")


def test_files_are_left_out_where_a_folder_is_meant(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").touch()
    assert "run.yaml" in near_path(tmp_path / "run.yml")
    assert near_path(tmp_path / "run.yml", folders=True) == ""
