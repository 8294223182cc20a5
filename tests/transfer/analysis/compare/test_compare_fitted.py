"""A comparison with an operator that must be fitted: each cell fits its own before its first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from graftvit.launch.cli import main
from support.runs.compare_runs import cell, write_config


@pytest.mark.slow
def test_hashed_attention_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, {"hash": "*: hash(anchors=5)"})
    config = yaml.safe_load(path.read_text())
    config["student"]["calibrate"] = 9
    path.write_text(yaml.safe_dump(config))
    assert main(["compare", str(path)]) == 0
    capsys.readouterr()
    found = cell(tmp_path, "hash-8")
    assert found["error"] is None
    assert found["new_parameters"] == 0
    errors = found["layer_errors"]
    assert set(errors) == {"zero-shot", "align", "task"}
    assert all(0 < error < 10 for layers in errors.values() for error in layers.values())
    assert (tmp_path / "out" / "cells" / "hash-8" / "1-align" / "fit" / "layer01.safetensors").exists()


@pytest.mark.slow
def test_plans_have_their_own_stages_and_several_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = {"transferred": "*: linear", "taught": "*: linear"}
    stages = {"uniform": ["task"], "taught": ["task"]}
    path = write_config(tmp_path, plans, stages=stages, seeds=[4, 1])
    assert main(["compare", str(path)]) == 0
    report = (tmp_path / "out" / "compare.md").read_text()
    assert "means over 2 seeds" in report
    assert "±" in report.split("| taught |")[1].split("\n")[0]
    capsys.readouterr()
    first, second = (cell(tmp_path, f"taught-8-seed{seed}") for seed in (4, 1))
    assert [score["stage"] for score in first["scores"]] == ["zero-shot", "task"]
    assert first["scores"][0]["loss"] == second["scores"][0]["loss"]  # the same teacher, converted
    assert first["scores"][1]["loss"] != second["scores"][1]["loss"]  # another order of images
    assert first["speeds"][0]["multiplications"] > first["speeds"][0]["macs"] / 2
    assert second["speeds"] == []
    whole = cell(tmp_path, "transferred-8-seed1")
    assert [score["stage"] for score in whole["scores"]] == ["zero-shot", "align", "task"]
    config = (tmp_path / "out" / "cells" / "taught-8-seed1" / "1-task" / "config.yaml").read_text()
    assert yaml.safe_load(config)["seed"] == 1
    (tmp_path / "out" / "cells" / "taught-8-seed1" / "cell.json").unlink()
    assert main(["compare", str(path), "--only", "taught-8-seed1"]) == 0
    assert cell(tmp_path, "taught-8-seed1") | {"load": 0} == second | {"load": 0}
    assert main(["compare", str(path), "--speed", "2"]) == 0
    assert cell(tmp_path, "taught-8-seed1")["speeds"] == []
