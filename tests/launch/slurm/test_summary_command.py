from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.checkpoints.json_lines import read_records
from graftvit.launch.cli import main
from graftvit.launch.load_config import dump_config
from graftvit.launch.slurm.summary import summarize
from graftvit.launch.slurm.sweep import cell_configs
from support.runs.engine_runs import config
from support.slurm.sweep_folders import make_sweep, write_run


def test_it_prints_the_table_and_writes_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path, "transfer.layers=first:6,all", "seed=0..1")
    for cell in sweep.cells[:3]:
        write_run(cell, [1.0, 2.0])
    assert main(["summary", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.out == (tmp_path / "summary.md").read_text()
    assert "| first:6 | 2/2 | 2.00 ± 0.00 |" in shown.out
    assert "- layers=all,seed=1 not begun" in shown.out
    assert shown.err.splitlines() == [str(tmp_path / f"summary.{end}") for end in ("csv", "md", "png")]


def test_a_folder_without_a_sweep_gets_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["summary", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path} is not a sweep" in line
    assert "--sweep" in line


def test_no_folder_gets_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary"]) == 2
    assert "FOLDER" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_still_shows_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sweep(tmp_path, "seed=0")
    (tmp_path / "summary.csv").mkdir()  # root may write to any folder, but not a file over one
    assert main(["summary", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "- seed=0 not begun" in shown.out
    assert "summary.csv cannot be written" in shown.err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "--help"]) == 0
    assert "graftvit summary runs/layers" in capsys.readouterr().out


@pytest.mark.parametrize("stages", [False, True])
def test_cells_that_the_ordinary_command_ran(
    tmp_path: Path, stages: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = dump_config(config(tmp_path / "elsewhere", optim={"epochs": 1}))
    recipe.write_text(text + "stages: [{name: one}, {name: two}]\n" * stages)
    sweep = make_sweep(tmp_path / "out", "seed=0..1", "clip_grad=1,none")
    for name, content in cell_configs(sweep, recipe).items():
        if name != "seed=1,clip_grad=none":
            (tmp_path / f"{name}.yaml").write_text(content)
            assert main(["train", str(tmp_path / f"{name}.yaml")]) == 0
    capsys.readouterr()
    summary = summarize(tmp_path / "out")
    assert [(row.settings["optim.clip_grad"], row.done) for row in summary.rows] == [("1", 2), ("none", 1)]
    for result in summary.rows[0].cells:
        log = read_records(result.cell.folder / ("2-two" if stages else "") / "log.jsonl")
        assert result.numbers["test_ema_top1"] == log[-1]["test_ema_top1"]
        assert result.numbers["train_loss"] == log[-1]["train_loss"]
    assert not (tmp_path / "elsewhere").exists()
