"""A comparison with an operator that must be fitted: each cell fits its own before its first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from compare_runs import cell, write_config
from graftvit.launch.cli import main


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
