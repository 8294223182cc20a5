from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.launch.load_config import load_comparison, load_stages
from graftvit.models.cost import attention_macs, other_macs
from graftvit.models.errors import ConfigError
from graftvit.transfer.analysis.compare.student_cell import train_cell
from support.runs.commands import Command
from support.runs.compare_runs import cell, write_config
from support.runs.typed import Typed


def test_a_dry_run_lists_the_cells_and_makes_nothing(tmp_path: Path, typed: Typed) -> None:
    path = write_config(tmp_path, {"linear": "*: linear"})
    lines = typed("compare", path, "--dry_run").out.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [
        ["teacher-8", "to", "do"], ["uniform-8", "to", "do"], ["linear-8", "to", "do"],
    ]  # fmt: skip
    assert "align (align), task (transfer)" in lines[3]
    assert not (tmp_path / "out").exists()


def test_a_comparison_of_plans_by_stage_lists_its_cells(typed: Typed) -> None:
    words = ["compare", "digits_pyramid_compare", "--dry_run", "--output_dir", "/nowhere/at/all"]
    assert "first-none-16  to do  stage1: none; stage2,stage3: linear" in typed(*words).out
    said = typed(*words, "--student.without", "[]", code=2).err
    assert "compare.plans: uniform at 16 px: plan: layer 0 has a relative position bias" in said


@pytest.mark.parametrize("recipe", ["digits_compare", "efficient_attention_cifar10"])
def test_the_recipes_list_their_cells(recipe: str, typed: Typed) -> None:
    shown = typed("compare", recipe, "--dry_run", "--output_dir", "/nowhere/at/all").out
    assert all(f"{name}-" in shown for name in ("uniform", "linformer", "performer", "nystrom", "hybrid"))
    assert ("teacher-12" in shown) == (recipe == "digits_compare")


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_numbers(tmp_path: Path, typed: Typed) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
        path = write_config(folder, {"linear": "*: linear"})
    state = cut / "out" / "cells" / "linear-8" / "1-align" / "checkpoints" / "last.safetensors"
    Command(["compare", str(path), "--only", "linear"], os.environ, tmp_path).kill_at(state.exists)
    assert state.exists()
    assert not (cut / "out" / "cells" / "linear-8" / "cell.json").exists()
    for folder in (cut, whole):
        assert "report:" in typed(f"compare {folder}/compare.yaml --only linear").out
    first, second = (cell(folder, "linear-8") for folder in (whole, cut))
    for one, other in zip(first["scores"], second["scores"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert first["layer_errors"] == second["layer_errors"]


@pytest.mark.slow
def test_a_failed_cell_is_named_stops_no_other_and_is_tried_again(
    tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, {"linear": "*: linear"})

    def broken(stages: Any, cell: Any, *others: Any) -> Any:
        if cell.name == "uniform":
            raise RuntimeError("out of luck")
        return train_cell(stages, cell, *others)

    with monkeypatch.context() as patch:
        patch.setattr("graftvit.transfer.analysis.compare.compare.train_cell", broken)
        error = typed("compare", path, code=1).err
    assert "the cell uniform-8 failed: RuntimeError: out of luck; the same command tries it again" in error
    assert "out of luck" in cell(tmp_path, "uniform-8")["error"]
    assert cell(tmp_path, "linear-8")["error"] is None
    assert "uniform-8  failed" in typed("compare", path, "--dry_run").out
    (tmp_path / "out" / "compare.csv").unlink()
    typed("compare", path, "--report")
    assert "out of luck" in (tmp_path / "out" / "compare.csv").read_text()
    assert "Failed: uniform at 8 px" in (tmp_path / "out" / "compare.md").read_text()
    typed("compare", path)
    assert cell(tmp_path, "uniform-8")["error"] is None
    for dry in ([], ["--dry_run"]):
        assert "measured with other settings" in typed("compare", path, "--lr", "0.5", *dry, code=2).err


def test_the_teacher_is_trained_first_and_once(tmp_path: Path, typed: Typed) -> None:
    path = write_config(tmp_path, {"linear": "*: linear"})
    config = yaml.safe_load(path.read_text())
    student = {key: value for key, value in config["student"].items() if key != "init"}
    recipe = {"mode": "scratch", "student": student, "data": config["data"], "engine": config["engine"],
              "optim": {"epochs": 1, "warmup_epochs": 0}}  # fmt: skip
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(recipe))
    config["compare"]["teacher_recipe"] = str(tmp_path / "teacher.yaml")
    path.write_text(yaml.safe_dump(config))
    assert load_comparison(path).config.teacher.source == f"local-dir:{tmp_path}/out/teacher/student"
    typed("compare", path, "--only", "teacher")
    log = tmp_path / "out" / "teacher" / "log.jsonl"
    top1 = json.loads(log.read_text().splitlines()[-1])["test_top1"]
    assert cell(tmp_path, "teacher-8")["scores"][0]["top1"] == top1
    before = log.stat().st_mtime_ns
    typed("compare", path, "--only", "teacher")
    assert log.stat().st_mtime_ns == before


def test_one_cell_alone_also_in_an_array(
    tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, {"linear": "*: linear"})
    monkeypatch.setitem(os.environ, "SLURM_ARRAY_TASK_ID", "2")
    assert "give each job its own --cell" in typed("compare", path, code=2).err
    line = f"compare digits_compare --output_dir {tmp_path}/other --cell uniform"
    assert "--only teacher first" in typed(line, code=2).err
    typed("compare", path, "--cell", "teacher-8")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert "1 of 1 cells are done" in typed("compare", path, "--cell", "teacher-8").err
    assert [folder.name for folder in (tmp_path / "out" / "cells").iterdir()] == ["teacher-8"]
    assert not (tmp_path / "out" / "compare.csv").exists()  # others may be writing it
    assert "--cell teacher-9: there is no such cell" in typed(f"compare {path} --cell teacher-9", code=2).err
    assert "give one of the two" in typed(f"compare {path} --cell teacher-8 --only linear", code=2).err


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no section 'compare'"):
        load_comparison("digits_scratch")
    path = write_config(tmp_path, {"linear": "*: linear"}, plan=3)
    with pytest.raises(ConfigError, match=r"compare\.plan'; did you mean 'plans'"):
        load_comparison(path)
    with pytest.raises(ConfigError, match=r"compare\.plans is \{\}"):
        load_comparison(write_config(tmp_path / ".", {}))


@pytest.mark.slow
def test_fresh_students_of_another_size_than_the_teacher_are_compared(tmp_path: Path, typed: Typed) -> None:
    path = write_config(tmp_path, {"linear": "*: linear"})
    config = yaml.safe_load(path.read_text())
    del config["stages"], config["student"]["init"]
    config |= {"mode": "transfer", "transfer": {"method": "feature"}}
    config["student"]["model_args"] |= {"embed_dim": 24, "depth": 1}
    config["optim"] = {"epochs": 1, "warmup_epochs": 0}
    path.write_text(yaml.safe_dump(config))
    for again in ([], ["--speed", "2"]):
        typed("compare", path, *again)
        teacher, uniform, linear = (cell(tmp_path, f"{name}-8") for name in ("teacher", "uniform", "linear"))
        assert uniform["error"] is linear["error"] is None
        assert uniform["layer_errors"] == linear["layer_errors"] == {}
        own = load_pretrained(f"local-dir:{tmp_path / 'given-teacher'}").model
        assert teacher["speeds"][0]["macs"] == sum(attention_macs(own)) + other_macs(own)


@pytest.mark.slow
def test_all_cells_are_timed_again_in_the_same_rounds(tmp_path: Path, typed: Typed) -> None:
    path = write_config(tmp_path, {"linear": "*: linear"}, speed_img_size=[16])
    typed("compare", path, "--speed", "1", code=2)
    typed("compare", path)
    before = [cell(tmp_path, name) for name in ("teacher-8", "uniform-8", "linear-8")]
    typed("compare", path, "--speed", "3")
    after = [cell(tmp_path, name) for name in ("teacher-8", "uniform-8", "linear-8")]
    for size in range(2):
        assert len({record["speeds"][size]["softmax_latency"] for record in before}) == 3
        assert len({record["speeds"][size]["softmax_latency"] for record in after}) == 1
    for old, new in zip(before, after, strict=True):
        assert old["scores"] == new["scores"]
        assert [speed["macs"] for speed in old["speeds"]] == [speed["macs"] for speed in new["speeds"]]
        assert [speed["latency"] for speed in old["speeds"]] != [speed["latency"] for speed in new["speeds"]]


def test_train_takes_the_stages_of_such_a_recipe() -> None:
    assert [stage.name for stage in load_stages("digits_compare")] == ["align", "features", "task"]
