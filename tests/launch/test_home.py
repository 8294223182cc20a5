"""A leading `~` is the home folder wherever a path is given: a shell leaves that of `--output_dir=~/x` alone."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest
from graftvit.launch.cli import main
from graftvit.launch.flags import command_parser, parse_command
from graftvit.launch.load_config import at_home, load_config


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("word", ["--output_dir=~/x", "--output-dir=~/x", "output_dir=~/x"])
def test_flags_and_words(word: str, home: Path) -> None:
    settings = parse_command(command_parser("train", "", []), [word])[1]
    assert load_config(None, settings).output_dir == home / "x"


def test_every_setting_that_may_be_a_path(home: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("output_dir: ~/runs\ndata: {data_path: ~/images}\nstudent: {init: local-dir:~/mae}\n")
    config = load_config(recipe, ["teacher.source=~/teacher"])
    assert config.output_dir == home / "runs"
    assert (config.data.data_path, config.student.init) == (f"{home}/images", f"local-dir:{home}/mae")
    assert config.teacher.source == f"{home}/teacher"
    assert load_config(None, {"output_dir": Path("~/x")}).output_dir == home / "x"


def test_the_home_of_another_user() -> None:
    root = pwd.getpwuid(os.getuid())
    assert at_home(f"~{root.pw_name}/x") == f"{root.pw_dir}/x"


@pytest.mark.parametrize("text", ["~nobody-has-this-name/x", "a~/x", "./~/x", "*: linear", "hf-hub:a/~b"])
def test_what_names_no_home_stays(text: str) -> None:
    assert at_home(text) == text


def test_flags_of_a_command_of_its_own(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "--json"]) == 0
    capsys.readouterr()
    assert main(["jobs", "summary", str(home / "none")]) == 2
    assert main(["submit", "digits_distill", "--site=~/mine.yaml"]) == 2
    assert f"--site {home}/mine.yaml does not exist" in capsys.readouterr().err


def test_a_whole_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits_distill", "--output_dir=~/run", "teacher.source=~/none", "--dry_run"]) == 2
    assert str(home / "none") in capsys.readouterr().err
