"""Recipes with several students: how they are read, shown, run and submitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.cli import main
from graftvit.launch.load_config import load_stages, load_students, parse_setting
from graftvit.launch.progress import read_progress
from graftvit.launch.sweep import frozen_text, run_configs
from graftvit.models.errors import ConfigError
from graftvit.models.plain_yaml import write_yaml
from support.runs.engine_runs import make_teacher, state

STUDENTS = {
    "linear": {"student.plan": "*: linear"},
    "hedgehog": {"student": {"plan": "*: hedgehog"}, "optim.lr": 0.002},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two students that are aligned for three steps."""
    teacher = make_teacher(tmp_path / "teacher")
    common: dict[str, Any] = {
        "mode": "align",
        "output_dir": str(tmp_path / "run"),
        "teacher": {"source": f"local-dir:{teacher}"},
        "data": {"dataset": "digits", "train_samples": 64, "batch_size": 16, "workers": 0, "aa": "none"},
        "optim": {"max_steps": 3, "lr": 0.001},
        "engine": {"device": "cpu", "report": False, "trackers": [], "progress": False},
        "students": STUDENTS,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(write_yaml(common))
    return path


def test_each_student_has_the_common_settings_and_its_own(recipe: Path) -> None:
    flags = ["--optim.lr=0.003", "--linear.optim.lr=0.004"]
    given = [parse_setting(*flag.lstrip("-").split("="), origin=flag) for flag in flags]
    students = load_students(recipe, given)
    assert [(name, each.student.plan) for name, each in students.items()] == [
        ("linear", "*: linear"),
        ("hedgehog", "*: hedgehog"),
    ]
    assert [each.optim.lr for each in students.values()] == [0.004, 0.003]
    assert load_students(recipe)["hedgehog"].optim.lr == 0.002
    assert load_stages(recipe) == []
    with pytest.raises(ConfigError, match="there is no student 'linar'"):
        load_students(recipe, [parse_setting("linar.optim.lr", "1", origin="--linar.optim.lr")])


def test_students_run_from_the_command_line_and_resume(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["train", str(recipe), "--print_config"]) == 0
    assert "# student hedgehog" in capsys.readouterr().out
    assert main(["train", str(recipe), "--dry_run"]) == 0
    assert "the student hedgehog:" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main(["train", str(recipe)]) == 0
    assert "hedgehog: epoch 0" in caplog.text, "a record says whose it is"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["hedgehog", "linear"]
    assert read_progress(tmp_path / "run").step == 3
    assert main(["train", str(tmp_path / "run" / "linear"), "--max_steps", "5"]) == 0
    assert read_progress(tmp_path / "run" / "linear").step == 5
    assert main(["train", str(recipe), "--max_steps", "5"]) == 0, "the other one comes after"
    assert state(tmp_path / "run" / "hedgehog").keys() != state(tmp_path / "run" / "linear").keys()


def test_the_settings_of_a_submission_keep_the_students(recipe: Path, tmp_path: Path) -> None:
    frozen = tmp_path / "frozen.yaml"
    frozen.write_text(frozen_text(str(recipe), []))
    assert load_students(frozen) == load_students(recipe)
    assert [each.student.plan for each in run_configs(str(frozen), [])] == ["*: linear", "*: hedgehog"]
    assert main(["submit", str(recipe), "--dry_run", "--gpus_per_node", "0", "--unchecked"]) == 0


def test_one_that_diverges_is_named_and_the_others_end(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["--linear.optim.lr", "1e30", "--linear.optim.opt", "sgd"]
    assert main(["train", str(recipe), *wild]) == 1
    assert "student linear: " in capsys.readouterr().err
    assert (tmp_path / "run" / "hedgehog" / "student").is_dir()
    assert not (tmp_path / "run" / "linear" / "student").exists()


@pytest.mark.parametrize(
    ("students", "message"),
    [
        ([{"name": "a"}], "must be a mapping of names"),
        ({}, "must be a mapping of names"),
        ({"a/b": {}}, "students"),
        ({"optim": {}}, "students.optim"),
        ({"jobs": {}}, "students.jobs"),
        ({"a": {"optim.blurr": 1}}, "optim.blurr"),
        ({"a": {}, "b": {"data.batch_size": 8}}, "data.batch_size"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], students: Any, message: str
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(write_yaml({"base": "recipe.yaml", "students": students}))
    assert main(["train", str(other)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_dry_run_names_the_student_that_cannot_be(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), "--hedgehog.student.plan", "9: linear", "--dry_run"]) == 2
    assert "student hedgehog: " in capsys.readouterr().err


def test_an_occupied_folder_is_refused_before_any_student_starts(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "hedgehog").mkdir(parents=True)
    (tmp_path / "run" / "hedgehog" / "config.yaml").touch()
    assert main(["train", str(recipe), "--resume", "never"]) == 2
    assert not (tmp_path / "run" / "linear").exists()


def test_stages_and_students_do_not_go_together(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(write_yaml({"base": "recipe.yaml", "stages": [{"name": "a"}]}))
    with pytest.raises(ConfigError, match="do not go together"):
        load_stages(other)
