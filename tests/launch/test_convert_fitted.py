"""`graftvit convert` with an operator that must be fitted: what it prints and refuses, and kill -9."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import graftvit
import pytest
import torch
from graftvit.launch.cli import main
from support.runs.engine_runs import make_teacher

KILLED = """
import os, signal, sys
from graftvit.checkpoints.student import FittedLayers
save = FittedLayers.save
def save_and_die(self, index, key, layer):
    save(self, index, key, layer)
    os.kill(os.getpid(), signal.SIGKILL)
FittedLayers.save = save_and_die
from graftvit.launch.cli import main
sys.exit(main(sys.argv[1:]))
"""
DIGITS = ("--calibrate", "6", "--dataset", "digits")


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return str(make_teacher(tmp_path / "teacher"))


def test_the_table_has_the_fit_of_each_layer(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    plan = "*: hash(anchors=7); 0: softmax"
    assert main(["convert", teacher, "--plan", plan, "--output_dir", str(out), *DIGITS]) == 0
    said = capsys.readouterr().out
    assert "fit of layer 1: objective " in said
    assert "fit of layer 0" not in said
    assert graftvit.load(str(out))(torch.zeros(1, 1, 8, 8)).isfinite().all()
    assert not (out / "fit").exists()


def test_an_error_that_calibration_did_not_change_is_one_number(
    teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fitted operator cannot run before its fit, and most others have nothing to calibrate."""
    plan = "0: hash(anchors=7); 1: hedgehog"
    assert main(["convert", teacher, "--plan", plan, "--dry_run", *DIGITS]) == 0
    said = capsys.readouterr().out
    rows = {line.split()[1]: line for line in said.splitlines() if line.endswith("  copied")}
    for row in rows.values():
        before, arrow, after = re.fullmatch(r".* %  (?:(\d\.\d{3}) (->) )?(\d\.\d{3}) *copied", row).groups()  # type: ignore[union-attr]
        assert (arrow is not None) == (row is rows["hedgehog"])
        assert before is None or before > after
    assert (
        "error: of the layer's output against softmax on 6 images of digits, before -> after calibration"
        in said
    )
    assert "one number where calibration changed nothing" in said


def test_a_model_that_could_not_run_is_not_written(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", teacher, "--plan", "1: hash", "--output_dir", str(tmp_path / "out")]) == 2
    assert "--plan has hash, which must be fitted to images: give --calibrate N" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_conversion_gives_the_same_bits(teacher: str, tmp_path: Path) -> None:
    words = ["convert", teacher, "--plan", "*: hash(anchors=7)", *DIGITS, "--seed", "3"]
    assert main([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    for finished in (1, 2):
        command = [sys.executable, "-c", KILLED, *words, "--output_dir", str(killed)]
        died = subprocess.run(command, capture_output=True, env=dict(os.environ), check=False)
        assert died.returncode == -signal.SIGKILL
        assert len(list((killed / "fit").glob("layer*.safetensors"))) == finished
    assert main([*words, "--output_dir", str(killed)]) == 0
    assert not (killed / "fit").exists()
    assert (killed / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
