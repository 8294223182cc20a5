"""`graftvit reproduce`, as typed: the kits of the package, and a tiny one from its surrogate to rows of others."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import yaml
from graftvit.launch.commands import demo
from graftvit.launch.commands.reproduce import COMMANDS
from graftvit.launch.load_config import recipe_names, recipe_text
from graftvit.transfer.analysis.demo import MethodResult, measure
from graftvit.transfer.bench_rows import read_rows
from graftvit.transfer.kits import Contrast, judge, load_kits
from support.runs.commands import Command
from support.runs.compare_runs import write_config
from support.runs.engine_runs import make_teacher
from support.runs.typed import Typed

KITS = load_kits()


# The kits of the package.


@pytest.mark.parametrize("name", KITS)
def test_recipes_of_a_kit_exist_and_state_its_number(name: str) -> None:
    kit = KITS[name]
    assert set(kit.recipes) <= set(recipe_names())
    assert re.search(r"arXiv:\d{4}\.\d{5}|\((ECCV|NeurIPS) \d{4}\)", kit.published.source)
    texts = [recipe_text(recipe) for recipe in kit.recipes]
    if len(texts) == 1 and "top-1" in texts[0]:
        assert f"{kit.published.top1}" in texts[0], "two places with different numbers"
    assert kit.gpu_hours > 0


@pytest.mark.parametrize("name", KITS)
def test_a_surrogate_can_be_started(name: str, typed: Typed) -> None:
    command = KITS[name].surrogate.command
    if command.startswith("compare"):
        typed(command, "--dry_run", "--output_dir", "/nowhere/at/all")


def test_the_kits_are_listed_and_explained(typed: Typed) -> None:
    table = typed("reproduce").out
    assert [line.split()[0] for line in table.splitlines()[1 : len(KITS) + 1]] == [*KITS]
    for name, kit in KITS.items():
        said = typed("reproduce", name).out
        assert kit.published.source in said
        assert all(f"graftvit train {recipe} --data_path" in said for recipe in kit.recipes)
        assert f"graftvit {kit.surrogate.command}" in said


def test_hours_are_those_of_the_run_that_they_are_scaled_from() -> None:
    finetuning = KITS["lit"].model_copy(update={"work": ((17.56, 100.0, 3.0),)})
    assert finetuning.gpu_hours == pytest.approx(32 * (7 + 11 / 60))


@pytest.mark.parametrize(
    ("differences", "outcome", "half"),
    [
        ((2.0, 3.0, 4.0), "shown", 4.303 / 3**0.5),
        ((-2.0, -3.0, -4.0), "contradicted", 4.303 / 3**0.5),
        ((-1.0, 3.0, 1.0), "not settled", 4.303 * 2 / 3**0.5),
    ],
)
def test_a_contrast_is_judged_by_its_interval(
    differences: tuple[float, ...], outcome: str, half: float
) -> None:
    top1 = {("a", seed): 50 + each for seed, each in enumerate(differences)}
    found = judge(
        Contrast(higher="a", lower="b", says="it helps"), top1 | {("b", seed): 50.0 for seed in range(9)}
    )
    assert found.outcome == outcome
    assert found.differences == pytest.approx(differences)
    assert found.half == pytest.approx(half, rel=1e-3)
    assert str(found).startswith(f"{outcome}: it helps")


@pytest.mark.parametrize(
    ("command", "students", "said"),
    [
        ("demo", ("copy/mae", "scatch"), "'scatch'; did you mean 'scratch'?"),
        ("demo", ("copy", "scratch"), "'copy'; did you mean 'copy/mae'?"),
        ("compare digits_lit_compare --only lit", ("lit", "windows"), "'windows'; valid: lit"),
        ("compare digits_lit_compare", ("lit", "teacher"), "lit and teacher have 0 seeds"),
        ("compare digits_lit_compare --only lit,windoes", ("lit", "windows"), "windoes"),
        ("compare digits_compare", ("linear", "uniform"), "linear and uniform have 0 seeds in common"),
        ("programs bench run attnbench_digits_long", ("values with", "q with"), "'q with'"),
        ("programs bench run attnbench_digits_long", ("values with", "softmax with"), "have 1 seed in common"),
        ("programs bench run attnbench_digits_long --seeds a", ("a", "b"), "--seeds"),
    ],
)  # fmt: skip
def test_a_contrast_without_its_students_is_refused_before_anything_runs(
    command: str, students: tuple[str, str], said: str, tmp_path: Path, typed: Typed
) -> None:
    words = write_kits(tmp_path, command, students=students)
    for more in ((), ("--surrogate", "--output_dir", tmp_path / "out")):
        assert said in typed(words, *more, code=2).err
    assert not (tmp_path / "out").exists()


# A tiny kit.

RECIPE = """
mode: scratch
student:
  model: vit_tiny_patch16_224
  img_size: 8
  model_args: {patch_size: 4, in_chans: 1, embed_dim: 8, depth: 1, num_heads: 1}
data: {dataset: digits, train_samples: 32, batch_size: 32, workers: 0}
optim: {epochs: 1, warmup_epochs: 0, lr: 1.0e-3}
engine: {device: cpu, trackers: [], report: false, progress: false}
"""


def write_kits(
    folder: Path,
    command: str = "demo",
    recipes: tuple[str, ...] = ("small.yaml",),
    students: tuple[str, str] = ("copy/mae", "scratch"),
) -> str:
    """The words that give a file of one kit, of the recipe `small.yaml` beside it."""
    (folder / "small.yaml").write_text(RECIPE)
    kit = {
        "claim": "something",
        "recipes": [str(folder / name) for name in recipes],
        "published": {
            "top1": 10.0, "beside": "nothing", "source": "arXiv:0000.00000 (NeurIPS 2000)", "tolerance": 90.0,
            "because": "it is small", "data": "digits", "images": 500,
        },
        "work": [[1.0, 1.0, 3.0]],
        "surrogate": {
            "command": command,
            "minutes": 1,
            "contrasts": [{"higher": students[0], "lower": students[1], "says": "it helps"}],
            "limits": "nothing",
        },
    }  # fmt: skip
    (folder / "kits.yaml").write_text(yaml.safe_dump({"tiny": kit}))
    return f"reproduce tiny --kits {folder / 'kits.yaml'}"


def test_the_commands_of_a_kit_of_a_file_name_the_file(tmp_path: Path, typed: Typed) -> None:
    words = write_kits(tmp_path)
    assert typed(words).out.count(f"graftvit {words} ") == 2
    (tmp_path / "small.yaml").unlink()
    assert "small.yaml" in typed(words, code=2).err, "nobody is told to run a recipe that is not there"


@pytest.mark.slow
def test_a_surrogate_that_is_killed_goes_on_to_the_same_verdict(tmp_path: Path, typed: Typed) -> None:
    config = write_config(tmp_path, {"linear": "*: linear"}, seeds=[0, 1])
    comparison = f"compare {config} --optim.lr 2e-3 --only uniform,linear"
    words = write_kits(tmp_path, comparison, students=("linear", "uniform")) + " --surrogate --output_dir"
    cut, done = tmp_path / "cut", tmp_path / "cut" / "cells" / "uniform-8-seed1" / "cell.json"
    Command([*shlex.split(words), str(cut)], os.environ, tmp_path).kill_at(done.exists)
    times = {path: path.stat().st_mtime_ns for path in cut.rglob("cell.json")}
    assert 1 < len(times) < 4
    resumed, whole = typed(words, cut).out, typed(words, tmp_path / "whole").out
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    verdicts = [
        next(line for line in said.splitlines() if "linear - uniform" in line) for said in (resumed, whole)
    ]
    assert verdicts[0] == verdicts[1]
    assert "2 seeds" in verdicts[0]


def test_the_demos_students_are_read_seed_by_seed(
    tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = [
        MethodResult("scratch", None, [70.0, 72.0, 71.0]),
        MethodResult("copy", "mae", [75.0, 76.0, 77.0]),
        MethodResult("copy", "supervised", [70.0, 74.0, 69.0]),
    ]
    measured = create_autospec(measure, return_value=SimpleNamespace(methods=methods, seeds=[0, 1, 2]))
    monkeypatch.setattr("graftvit.transfer.analysis.demo.measure", measured)
    monkeypatch.setattr(demo, "run", lambda words: 0)
    said = typed("reproduce", "attention-copy", "--surrogate", "--output_dir", tmp_path).out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["shown", "not settled", "limits"]
    assert "copy/mae - scratch is +5.0 points" in said[0]


@pytest.fixture
def run(tmp_path: Path, typed: Typed) -> Path:
    """A finished run of the tiny kit's recipe."""
    write_kits(tmp_path)
    typed("train", tmp_path / "small.yaml", "--output_dir", tmp_path / "run", "--seed", 3)
    return tmp_path / "run"


def test_a_row_is_made_merged_and_verified_by_others(run: Path, tmp_path: Path, typed: Typed) -> None:
    words, rows = write_kits(tmp_path), tmp_path / "rows.jsonl"
    assert "agrees" in typed(words, "--row", run, "--out", rows).out
    typed(words, "--row", f"{run}/student", "--out", rows)
    (row,) = read_rows(rows)
    logged = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert (row.name, row.seed, row.data, row.top1) == (
        "tiny",
        3,
        "digits",
        pytest.approx(logged["test_top1"]),
    )
    assert "tiny" in typed("programs", "bench", "query", rows).out
    typed(words, "--row", f"{run}/student", "--verify", rows)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("curve", [{"epoch": 1, "top1": 85.7, "loss": 0.1}]),
        ("hash", "0" * 16),
        ("settings", "0" * 16),
        ("seed", 4),
    ],
)
def test_a_forged_row_is_refused(field: str, value: object, run: Path, tmp_path: Path, typed: Typed) -> None:
    words, rows = write_kits(tmp_path), tmp_path / "rows.jsonl"
    typed(words, "--row", run, "--out", rows)
    rows.write_text(json.dumps(json.loads(rows.read_text()) | {field: value}) + "\n")
    assert "rows.jsonl" in typed(words, "--row", run, "--verify", rows, code=1).err


def test_a_run_of_other_settings_or_images_is_no_row(run: Path, tmp_path: Path, typed: Typed) -> None:
    words = write_kits(tmp_path)
    text = (tmp_path / "kits.yaml").read_text()
    (tmp_path / "kits.yaml").write_text(text.replace("images: 500", "images: 50000"))
    assert "50,000" in typed(words, "--row", run, code=2).err
    (tmp_path / "kits.yaml").write_text(text)
    (tmp_path / "small.yaml").write_text(RECIPE.replace("epochs: 1,", "epochs: 2,"))
    assert "optim.epochs" in typed(words, "--row", run, code=2).err


def test_a_row_of_two_runs_is_of_their_ensemble(run: Path, tmp_path: Path, typed: Typed) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    typed("train", tmp_path / "small.yaml", "--output_dir", tmp_path / "other", "--seed", 4)
    words, rows = write_kits(tmp_path, recipes=("small.yaml", "small.yaml")), tmp_path / "rows.jsonl"
    assert "--row" in typed(words, "--row", run, code=2).err
    typed(words, "--row", run, "--row", tmp_path / "other", "--out", rows)
    said = typed("evaluate", run, tmp_path / "other").out
    ensemble = next(line for line in said.splitlines() if "ensemble" in line)
    assert f"{read_rows(rows)[0].top1:.2f}" in ensemble


def test_a_student_of_stages_is_checked_in_each(tmp_path: Path, typed: Typed) -> None:
    words, recipe, out = write_kits(tmp_path), tmp_path / "small.yaml", tmp_path / "run"
    text = f"""
teacher: {{source: "local-dir:{make_teacher(tmp_path / "teacher")}"}}
student: {{init: teacher, plan: "*: linear"}}
data: {{dataset: digits, train_samples: 32, batch_size: 32, workers: 0}}
engine: {{device: cpu, trackers: [], report: false, progress: false}}
stages:
- {{name: attention, mode: align, optim: {{epochs: 1, warmup_epochs: 0, lr: 2.0e-3}}}}
- {{name: task, mode: finetune, optim: {{epochs: 1, warmup_epochs: 0, lr: 1.0e-3}}}}
"""
    recipe.write_text(text)
    typed("train", recipe, "--output_dir", out)
    for student in (out, out / "student"):
        typed(words, "--row", student, "--out", tmp_path / "rows.jsonl")
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert row.program == "*: linear"
    for stage, rate in {"attention": "2.0e-3", "task": "1.0e-3"}.items():
        recipe.write_text(text.replace(rate, "3.0e-3"))
        assert "optim.lr" in typed(words, "--row", out, code=2).err, stage


def test_kits_that_are_not_valid_are_refused(tmp_path: Path, typed: Typed) -> None:
    path = tmp_path / "kits.yaml"
    for text in ("- a", "a: {claim: b}", "{", "a: 1"):
        path.write_text(text)
        typed("reproduce", "--kits", path, code=2)
    for command in ("train x", "", "demo --quick", "compare --only linear", "compare x 'open"):
        words = write_kits(tmp_path, command)
        assert f"tiny.surrogate.command is {command!r}" in typed(words, code=2).err
    text = path.read_text()
    path.write_text(text.replace("beside: nothing", ""))
    assert f"{path}: tiny.published.beside is missing" in typed("reproduce --kits", path, code=2).err
    assert all(each.module.__name__.endswith(f".{name}") for name, each in COMMANDS.items())
