"""Recipes of several stages: chained, resumed, stopped in between, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graftvit
import pytest
import torch
import yaml
from graftvit.checkpoints.json_lines import read_records
from graftvit.launch.cli import main
from graftvit.models.conversion import plan_of
from graftvit.models.errors import ConfigError
from graftvit.transfer.engine.stages import Stage, chain, train_stages
from support.runs.engine_runs import config


def recipe(folder: Path, teacher: Path) -> Path:
    base = config(folder / "run", teacher).model_dump(mode="json")
    short: dict[str, Any] = {"optim": {"max_steps": 4}}
    base["student"] |= {
        "model": f"local-dir:{teacher}",
        "plan": "*: linear",
        "model_args": {},
        "drop_path": 0.0,
    }
    base["optim"] |= {"ema": None}
    base["stages"] = [
        {"name": "align", "mode": "align", "engine": {"evaluate_start": True}, **short},
        {"name": "feature", "transfer": {"method": "feature", "weight": 1.0, "task_weight": 0.0}, **short},
        {
            "name": "task",
            "transfer": {"method": "attention_output", "weight": 50.0, "reduction": "mean"},
            **short,
        },
    ]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return graftvit.load(str(folder)).state_dict()


def test_stages_go_on_from_one_another(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe(tmp_path, teacher))]) == 0
    out = capsys.readouterr().out
    run = tmp_path / "run"
    assert [line.partition(":")[0] for line in out.splitlines()] == ["align", "feature", "task"]
    measured = json.loads((run / "stages.json").read_text())
    assert list(measured) == ["align", "feature", "task"]
    assert f"task: top-1 {measured['task']['test_top1']:.2f} %" in out
    zero_shot = read_records(run / "1-align" / "log.jsonl")[0]
    assert zero_shot["step"] == 0
    assert 0 <= zero_shot["test_top1"] <= 100
    first, second, third = (weights(run / name / "student") for name in ("1-align", "2-feature", "3-task"))
    original = graftvit.load(str(teacher)).state_dict()
    same = {name for name in original if torch.equal(original[name], first[name])}
    assert "blocks.0.attn.proj.weight" in same
    assert "blocks.0.attn.qkv.weight" not in same
    assert torch.equal(first["head.weight"], second["head.weight"])  # no label was looked at
    assert not torch.equal(second["head.weight"], third["head.weight"])
    published = weights(run / "student")
    assert all(torch.equal(tensor, published[name]) for name, tensor in third.items())
    assert plan_of(graftvit.load(str(run / "student"))) == "*: linear"


def test_a_run_of_stages_is_a_source_and_brings_its_data(teacher: Path, tmp_path: Path) -> None:
    assert main(["train", str(recipe(tmp_path, teacher))]) == 0
    run, file = tmp_path / "run", tmp_path / "found.json"
    last = [record for record in read_records(run / "3-task" / "log.jsonl") if "test_top1" in record]
    best = max(record["test_top1"] for record in last)
    wanted = {
        str(run): last[-1]["test_top1"],
        f"{run}#best": best,
        str(run / "student"): last[-1]["test_top1"],
    }
    for source, top1 in wanted.items():
        assert main(["evaluate", source, "--device", "cpu", "--json", str(file)]) == 0
        assert json.loads(file.read_text())[source]["top1"] == top1
    (run / "student").rename(tmp_path / "student")  # as before the last stage has ended
    assert all(
        torch.equal(tensor, weights(run)[name]) for name, tensor in weights(tmp_path / "student").items()
    )


def test_a_lost_stage_alone_is_done_again(teacher: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, teacher)
    assert main(["train", str(path)]) == 0
    run = tmp_path / "run"
    before, times = weights(run / "student"), {}
    for name in ("1-align", "2-feature"):
        times[name] = (run / name / "checkpoints" / "last.safetensors").stat().st_mtime_ns
    for file in (run / "3-task" / "checkpoints").iterdir():
        file.unlink()
    assert main(["train", str(path)]) == 0
    assert all(
        (run / name / "checkpoints" / "last.safetensors").stat().st_mtime_ns == was
        for name, was in times.items()
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run / "student").items())


def test_flags_hold_for_all_stages(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, teacher)
    assert main(["train", str(path), "--print_config", "--batch_size", "7"]) == 0
    stages = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [stage["data"]["batch_size"] for stage in stages] == [7, 7, 7]
    assert [stage["mode"] for stage in stages] == ["align", "transfer", "transfer"]
    assert stages[1]["student"]["model"] == f"local-dir:{tmp_path / 'run' / '1-align' / 'student'}"
    assert stages[0]["student"]["plan"] == "*: linear"
    assert stages[1]["student"]["plan"] is None
    assert main(["train", str(path), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "stage feature: mode transfer, 4 steps" in shown
    assert "converted by '*: linear'" in shown


def converting(folder: Path, teacher: Path, plan: str) -> Path:
    """A recipe whose second stage converts the student of the first; neither moves a weight."""
    still: dict[str, Any] = {"optim": {"max_steps": 2, "lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0}}
    base = config(folder / "run", teacher).model_dump(mode="json")
    base["student"] |= {"init": "teacher", "drop_path": 0.0}
    base["optim"] |= {"ema": None}
    base["stages"] = [
        {"name": "softmax", "mode": "finetune", "student": {"plan": "*: softmax"}, **still},
        {"name": "hash", "mode": "finetune", "student": {"plan": plan, "calibrate": 9}, **still},
        {"name": "more", "mode": "finetune", "student": {"plan": plan}, **still},
    ]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


def test_a_stage_with_another_plan_converts_the_student(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = converting(tmp_path, teacher, "0: hash(anchors=5, bits=4); 1: softmax")
    assert main(["train", str(path), "--dry_run"]) == 0
    first, _, second = capsys.readouterr().out.partition("the stage hash, which converts the student:")
    assert "hash(" not in first
    assert "converted by '0: hash(anchors=5, bits=4)" in second
    assert "the stage more" not in second
    assert main(["train", str(path)]) == 0
    run = tmp_path / "run"
    plans = [plan_of(graftvit.load(run / folder / "student")) for folder in ("1-softmax", "2-hash", "3-more")]
    assert plans[0] is None
    assert plans[1] == plans[2] == "0: hash(anchors=5, bits=4); 1: softmax"
    softmax, hashed, more = (weights(run / name / "student") for name in ("1-softmax", "2-hash", "3-more"))
    shared = softmax.keys() & hashed.keys()
    assert "blocks.0.attn.proj.weight" in shared
    assert hashed["blocks.0.attn.operator.weight"].any()
    for name in shared:
        torch.testing.assert_close(softmax[name], hashed[name], rtol=0, atol=1e-20)
    for name in hashed:  # fitted once
        torch.testing.assert_close(hashed[name], more[name], rtol=0, atol=1e-20)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("*: focused", "*: linear"),
        ("*: hedgehog", "*: softmax"),
        ("*: focused", "0: focused; 1: inline"),
        ("*: linformer(num_keys=4)", "0: linformer(num_keys=2); 1: linformer(num_keys=4)"),
    ],
)
def test_a_stage_exchanges_operators_that_have_parameters(
    before: str, after: str, teacher: Path, tmp_path: Path
) -> None:
    """A layer of the same operator keeps its parameters."""
    path = converting(tmp_path, teacher, after)
    base = yaml.safe_load(path.read_text())
    base["stages"][0]["student"]["plan"] = before
    for stage in base["stages"][1:]:
        del stage["student"]
    base["stages"][1]["student"] = {"plan": after}
    path.write_text(yaml.safe_dump(base))
    assert main(["train", str(path)]) == 0
    run = tmp_path / "run"
    first, last = weights(run / "1-softmax" / "student"), weights(run / "student")
    assert plan_of(graftvit.load(run / "student")) == (None if after == "*: softmax" else after)
    for name, tensor in last.items():
        if name in first and first[name].shape == tensor.shape and "operator" not in name:
            torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-20)
    kept = [name for name in last if "blocks.1.attn.operator" in name and before.split()[1] in after.split()]
    assert all(torch.allclose(last[name], first[name], rtol=0, atol=1e-20) for name in kept)


def test_operators_are_left_out_only_for_a_plan_that_was_asked_for(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = converting(tmp_path, teacher, "*: focused")
    base = yaml.safe_load(path.read_text())
    base["stages"] = [base["stages"][1]]
    base["stages"][0]["student"] = {"plan": "*: focused"}
    path.write_text(yaml.safe_dump(base))
    assert main(["train", str(path)]) == 0
    del base["stages"], base["teacher"]
    base["output_dir"], base["student"]["init"] = str(tmp_path / "next"), str(tmp_path / "run" / "student")
    base |= {"mode": "finetune"}
    base["student"]["plan"] = None
    path.write_text(yaml.safe_dump(base))
    assert main(["train", str(path), "--dry_run"]) == 2
    assert "weights of focused in blocks.0.attn, where the model has softmax" in capsys.readouterr().err
    assert main(["train", str(path), "--dry_run", "--plan", "*: linear"]) == 0


def test_a_stage_after_one_that_copies_is_refused_before_anything_runs(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = converting(tmp_path, teacher, "*: linear")
    base = yaml.safe_load(path.read_text())
    copying = {"name": "copy", "mode": "transfer", "transfer": {"method": "copy"}}
    base["stages"] = [copying, {"name": "more", "mode": "finetune"}]
    for words in ([], ["--dry_run"]):
        path.write_text(yaml.safe_dump(base))
        assert main(["train", str(path), *words]) == 2
        assert "stage copy: its student runs with the teacher's attention" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_plan_of_a_later_stage_is_checked_before_the_first(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = converting(tmp_path, teacher, "*: hsh")
    assert main(["train", str(path), "--dry_run"]) == 2
    assert "did you mean 'hash'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--dry_run"], []])
def test_another_number_of_classes_is_refused_before_the_first_stage(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    path = recipe(tmp_path, teacher)  # only its last stage learns from labels
    assert main(["train", str(path), "--num_classes", "1000", *words]) == 2
    assert "data.num_classes=1000, but the data set has 10 named classes" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/*/*.jsonl"))


def test_a_stage_that_is_stopped_stops_the_rest(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [
        Stage("a", config(tmp_path, teacher, optim={"max_steps": 2})),
        Stage("b", config(tmp_path, teacher, optim={"max_steps": 2})),
    ]
    from graftvit.transfer.engine import loop

    monkeypatch.setattr(loop.Loop, "_epoch_steps", lambda self: 15)
    result = train_stages(stages)
    assert result.signal == 15
    assert list(result.results) == ["a"]
    assert not (tmp_path / "2-b").exists()
    assert not (tmp_path / "student").exists()


def test_mistakes(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Stage("a", config(tmp_path, teacher))
    with pytest.raises(ConfigError, match="two are called 'a'"):
        chain([one, one])
    with pytest.raises(ConfigError, match=r"stages: '\.\./\.\./x' is no name of a file"):
        chain([Stage("../../x", one.config)])
    with pytest.raises(ConfigError, match="stages is empty"):
        chain([])
    with pytest.raises(ConfigError, match=r"stages\.b\.output_dir: all stages share one"):
        chain([one, Stage("b", config(tmp_path / "other", teacher))])

    def refused(content: Any, *words: str) -> str:
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump(content))
        assert main(["train", str(path), *words]) == 2
        return capsys.readouterr().err

    assert "'stages' must be a list" in refused({"stages": {"a": 1}})
    assert "stages[0] needs a name" in refused({"stages": [{"mode": "align"}]})
    assert "did you mean 'optim.epochs'" in refused({"stages": [{"name": "a", "optim": {"epoch": 1}}]})
    labels = {"mode": "transfer", "transfer": {"method": "copy", "task_weight": 0.0}}
    base = config(tmp_path / "x", teacher).model_dump(mode="json")
    assert "leaves nothing to learn" in refused({**base, **labels, "transfer": labels["transfer"]})
