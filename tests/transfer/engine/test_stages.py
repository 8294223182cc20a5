"""Recipes of several stages: chained, resumed, stopped in between, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import graftvit
import pytest
import torch
import yaml
from graftvit.checkpoints.files import read_records
from graftvit.launch.cli import main
from graftvit.models.conversion import plan_of
from graftvit.models.errors import ConfigError
from graftvit.transfer.engine import loop
from graftvit.transfer.engine.stages import Stage, chain, train_stages
from support.runs.engine_runs import config


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return graftvit.load(str(folder)).state_dict()


def same(one: Path, other: Path) -> bool:
    own = weights(other)
    return all(torch.equal(tensor, own[name]) for name, tensor in weights(one).items())


def write_recipe(folder: Path, teacher: Path, student: dict[str, Any], stages: list[dict[str, Any]]) -> Path:
    base = config(folder / "run", teacher).model_dump(mode="json")
    base["student"] |= {"drop_path": 0.0, **student}
    base["optim"] |= {"ema": None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(base | {"stages": stages}))
    return folder / "recipe.yaml"


def change(path: Path, action: Callable[[dict[str, Any]], object]) -> None:
    base = yaml.safe_load(path.read_text())
    action(base)
    path.write_text(yaml.safe_dump(base))


def recipe(folder: Path, teacher: Path) -> Path:
    short: dict[str, Any] = {"optim": {"max_steps": 4}}
    feature = {"method": "feature", "weight": 1.0, "task_weight": 0.0}
    output = {"method": "attention_output", "weight": 50.0, "reduction": "mean"}
    student = {"model": f"local-dir:{teacher}", "plan": "*: linear", "model_args": {}}
    align = {"name": "align", "mode": "align", "engine": {"evaluate_start": True}, **short}
    stages = [
        {"name": "feature", "transfer": feature, **short},
        {"name": "task", "transfer": output, **short},
    ]
    return write_recipe(folder, teacher, student, [align, *stages])


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
    unchanged = {name for name in original if torch.equal(original[name], first[name])}
    assert "blocks.0.attn.proj.weight" in unchanged
    assert "blocks.0.attn.qkv.weight" not in unchanged
    assert torch.equal(first["head.weight"], second["head.weight"])  # no label was looked at
    assert not torch.equal(second["head.weight"], third["head.weight"])
    assert same(run / "3-task" / "student", run / "student")
    assert plan_of(graftvit.load(str(run / "student"))) == "*: linear"


def test_a_run_of_stages_is_a_source_and_brings_its_data(teacher: Path, tmp_path: Path) -> None:
    assert main(["train", str(recipe(tmp_path, teacher))]) == 0
    run, file = tmp_path / "run", tmp_path / "found.json"
    scores = [r["test_top1"] for r in read_records(run / "3-task" / "log.jsonl") if "test_top1" in r]
    wanted = {str(run): scores[-1], f"{run}#best": max(scores), str(run / "student"): scores[-1]}
    for source, top1 in wanted.items():
        assert main(["evaluate", source, "--device", "cpu", "--json", str(file)]) == 0
        assert json.loads(file.read_text())[source]["top1"] == top1
    (run / "student").rename(tmp_path / "student")  # as before the last stage has ended
    assert same(tmp_path / "student", run)


def test_a_lost_stage_alone_is_done_again(teacher: Path, tmp_path: Path) -> None:
    path, run = recipe(tmp_path, teacher), tmp_path / "run"
    assert main(["train", str(path)]) == 0
    before = shutil.copytree(run / "student", tmp_path / "before")
    states = [run / name / "checkpoints" / "last.safetensors" for name in ("1-align", "2-feature")]
    times = [state.stat().st_mtime_ns for state in states]
    for file in (run / "3-task" / "checkpoints").iterdir():
        file.unlink()
    assert main(["train", str(path)]) == 0
    assert [state.stat().st_mtime_ns for state in states] == times
    assert same(run / "student", before)


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
    still = {"mode": "finetune", "optim": {"max_steps": 2, "lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0}}
    plans = {
        "softmax": {"plan": "*: softmax"},
        "hash": {"plan": plan, "calibrate": 9},
        "more": {"plan": plan},
    }
    stages = [{"name": name, "student": student, **still} for name, student in plans.items()]
    return write_recipe(folder, teacher, {"init": "teacher"}, stages)


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
    path, run = converting(tmp_path, teacher, after), tmp_path / "run"

    def plans(base: dict[str, Any]) -> None:
        for stage, plan in zip(base["stages"], (before, after, None), strict=True):
            stage["student"] = {} if plan is None else {"plan": plan}

    change(path, plans)
    assert main(["train", str(path)]) == 0
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
    change(path, lambda base: base.update(stages=[base["stages"][1] | {"student": {"plan": "*: focused"}}]))
    assert main(["train", str(path)]) == 0

    def start_from_it(base: dict[str, Any]) -> None:
        del base["stages"], base["teacher"]
        base |= {"mode": "finetune", "output_dir": str(tmp_path / "next")}
        base["student"] |= {"plan": None, "init": str(tmp_path / "run" / "student")}

    change(path, start_from_it)
    assert main(["train", str(path), "--dry_run"]) == 2
    assert "weights of focused in blocks.0.attn, where the model has softmax" in capsys.readouterr().err
    assert main(["train", str(path), "--dry_run", "--plan", "*: linear"]) == 0


def test_a_wrong_later_stage_is_refused_before_anything_runs(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = converting(tmp_path, teacher, "*: hsh")
    assert main(["train", str(path), "--dry_run"]) == 2
    assert "did you mean 'hash'" in capsys.readouterr().err
    copying = {"name": "copy", "mode": "transfer", "transfer": {"method": "copy"}}
    change(path, lambda base: base.update(stages=[copying, {"name": "more", "mode": "finetune"}]))
    for words in ([], ["--dry_run"]):
        assert main(["train", str(path), *words]) == 2
        assert "stage copy: its student runs with the teacher's attention" in capsys.readouterr().err
    path = recipe(tmp_path, teacher)  # only its last stage learns from labels
    for words in ([], ["--dry_run"]):
        assert main(["train", str(path), "--num_classes", "1000", *words]) == 2
        assert "data.num_classes=1000, but the data set has 10 named classes" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/*/*.jsonl"))


def test_a_stage_that_is_stopped_stops_the_rest(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: loop.Loop) -> Generator[int, None, int]:
        yield 0
        return 15

    monkeypatch.setattr(loop.Loop, "_epoch_steps", stopped)
    result = train_stages([Stage(name, config(tmp_path, teacher, optim={"max_steps": 2})) for name in "ab"])
    assert result.signal == 15
    assert list(result.results) == ["a"]
    assert not (tmp_path / "2-b").exists()
    assert not (tmp_path / "student").exists()


def test_mistakes(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Stage("a", config(tmp_path, teacher))
    for stages, message in (
        ([one, one], "two are called 'a'"),
        ([Stage("../../x", one.config)], r"stages: '\.\./\.\./x' is no name of a file"),
        ([], "stages is empty"),
        (
            [one, Stage("b", config(tmp_path / "other", teacher))],
            r"stages\.b\.output_dir: all stages share one",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            chain(stages)
    nothing = config(tmp_path / "x", teacher).model_dump(mode="json") | {"mode": "transfer"}
    path = tmp_path / "bad.yaml"
    for content, message in (
        ({"stages": {"a": 1}}, "'stages' must be a list"),
        ({"stages": [{"mode": "align"}]}, "stages[0] needs a name"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "stages[1] has the name 'a'"),
        ({"stages": [{"name": "a", "optim": {"epoch": 1}}]}, "did you mean 'optim.epochs'"),
        ({**nothing, "transfer": {"method": "copy", "task_weight": 0.0}}, "leaves nothing to learn"),
    ):
        path.write_text(yaml.safe_dump(content))
        assert main(["train", str(path)]) == 2
        assert message in capsys.readouterr().err
