"""What a mistyped path is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.checkpoints import files as paths
from graftvit.checkpoints.files import near_path
from graftvit.models.errors import CheckpointError, ConfigError


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


@pytest.mark.parametrize(
    "name", ["vit", "vit_tiny.mae", "layers=first-6,seed=0~ab12", "größe", "+3", "a" * 180]
)
def test_a_name_may_be_part_of_a_path(name: str) -> None:
    assert paths.safe_name(name, "x") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "../a",
        "/a",
        "a\\b",
        "a\0",
        "a\n",
        "C:",
        "a b",
        "~",
        "a" * 181,
        "ö" * 91,
    ],
)
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^compare\.plans: '.*' is no name of a file: "):
        paths.safe_name(name, "compare.plans")
    with pytest.raises(CheckpointError):
        paths.safe_name(name, "x", refusal=CheckpointError)
