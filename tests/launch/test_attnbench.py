"""`graftvit programs bench`, as typed; the rows that come with the package, and rows from somebody else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.launch.load_config import load_bench, load_rows
from graftvit.models.errors import ConfigError
from graftvit.models.programs.program import FOUND, parse_program
from graftvit.transfer import bench_run as bench_settings
from graftvit.transfer import bench_run as bench_verify
from graftvit.transfer import bench_run as trial_run
from graftvit.transfer.bench_rows import Row, merge_rows, read_rows, row_text, write_rows
from graftvit.transfer.bench_run import CONTROLS, Bench, Trial, list_cells, list_programs, verify_rows
from graftvit.transfer.config import OptimConfig, RunConfig
from graftvit.transfer.engine.train import RunResult
from support.files.irregular_files import irregular, never_waiting
from support.runs.engine_runs import make_teacher
from support.runs.limits import limited_memory, limited_work
from support.runs.typed import Typed

SHORT = """
base: attnbench_digits
data: {train_samples: 64}
optim: {epochs: 2}
engine: {eval_every: 1}
attnbench:
  backbones:
    plain:
      student:
        img_size: 8
        model_args: {patch_size: 4, in_chans: 1, embed_dim: 8, depth: 1, num_heads: 1}
    second: {student: {model: pvt_tiny, img_size: 8, model_args: {patch_size: 4, in_chans: 1, embed_dims: [8],
      depths: [1], num_heads: [1], sr_ratios: [1], mlp_ratios: [1]}}}
  data: {digits: {}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "short.yaml"
    path.write_text(SHORT)
    return str(path)


def outcome(row: Row) -> Any:
    return row.key, row.status, row.curve, row.parameters, row.macs


@pytest.mark.slow
def test_rows_are_run_extended_merged_queried_and_verified(recipe: str, tmp_path: Path, typed: Typed) -> None:
    first, a, b = tmp_path / "a" / "rows.jsonl", tmp_path / "a", tmp_path / "b"
    run = f"programs bench run {recipe} --output_dir {a} --backbone plain --local with"
    typed(run)
    rows = read_rows(first)
    assert {row.name for row in rows} == set(CONTROLS)
    assert all(row.status == "trained" and [p.epoch for p in row.curve] == [1, 2] for row in rows)
    assert not list(a.rglob("run"))
    typed(f"{run} --program 'mul(q v)' --processes 2")
    assert len(read_rows(first)) == len(CONTROLS) + 1
    typed(run)
    assert len(read_rows(first)) == len(CONTROLS) + 1, "rows of earlier commands stay"

    more = "--program 'mul(q v)' --program attnzero_105 --processes 2"
    typed(f"programs bench extend {first} {recipe} --backbone plain {more} --output_dir {b}")
    both = read_rows(b / "rows.jsonl")
    assert len(both) == 2 * (len(CONTROLS) + 2)
    assert {outcome(row) for row in rows} <= {outcome(row) for row in both}
    assert not (b / "cells" / rows[0].hash / "plain-digits-0-with").exists()
    refused = [row for row in both if row.status == "refused"]
    assert {(row.program, row.reason.partition(":")[0]) for row in refused} == {("mul(q v)", "gradients")}

    merged = tmp_path / "all.jsonl"
    typed(f"programs bench merge {b}/rows.jsonl {first} --out {merged}")
    assert read_rows(merged) == both
    said = typed(f"programs bench query {merged} --program values --json").out
    assert [json.loads(line)["program"] for line in said.splitlines()] == ["v", "v"]
    verify = f"programs bench verify {merged} --config {recipe}"
    assert "3 rows agree" in typed(f"{verify} --sample 3").out

    merged.write_text(merged.read_text().replace('"loss": ', '"loss": 1'))
    assert "1 of 1 row differ" in typed(f"{verify} --sample 1 --program values", code=1).err


def test_the_digest_holds_what_numbers_depend_on_and_no_path(recipe: str) -> None:
    from graftvit.launch.load_config import Setting

    bench = load_bench(recipe)
    own = bench.digest("plain", "digits")
    assert own != bench.digest("second", "digits")
    elsewhere = load_bench(recipe, [Setting("data.workers", 2, "--workers"), Setting("seed", 5, "--seed")])
    assert elsewhere.digest("plain", "digits") == own
    assert load_bench(recipe, [Setting("optim.lr", 1.0, "--lr")]).digest("plain", "digits") != own


def test_the_digest_of_a_transfer_holds_its_teacher_and_losses(recipe: str, tmp_path: Path) -> None:
    from graftvit.launch.load_config import Setting

    teacher = make_teacher(tmp_path / "teacher")

    def own(folder: Path = teacher, **changes: Any) -> str:
        method = {"mode": "transfer", "transfer.method": "attention_output"}
        settings = {**method, "teacher.source": f"local-dir:{folder}", **changes}
        bench = load_bench(recipe, [Setting(key, value, key) for key, value in settings.items()])
        return bench.digest("plain", "digits")

    first = own()
    assert len({first, own(**{"transfer.weight": 2.0}), own(mode="scratch")}) == 3
    assert own(teacher.rename(tmp_path / "moved")) == first
    assert own(make_teacher(teacher, mean=(0.4,))) != first


def test_a_setting_that_is_added_later_does_not_change_the_digest(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_settings, "digest", lambda settings: settings[0])
    settings: Any = load_bench(recipe).digest("plain", "digits")
    assert settings["optim"]["epochs"] == 2
    assert settings["data"]["train_samples"] == 64
    defaults = OptimConfig().model_dump(mode="json")
    assert all(value != defaults[name] for name, value in settings["optim"].items())


def test_programs_are_canonical_and_each_once() -> None:
    programs = list_programs(["softmax", "mul(v q)", "mul(q v)", "attnzero_40"], 5, 1)
    assert len(programs) == len(set(programs)) == len(CONTROLS) + 1 + 5
    assert programs == [parse_program(text).text for text in programs]
    assert list_programs([], 5, 1)[-5:] == programs[-5:]


def test_the_published_benchmark_has_its_models_and_data() -> None:
    bench = load_bench("attnbench_published")
    assert set(bench.settings.backbones) == {"deit_tiny", "pvt_tiny", "pvt_v2_b0", "swin_tiny"}
    assert set(bench.settings.data) == {"cifar100", "flowers102"}
    config = bench.run_config("swin_tiny", "cifar100")
    optim = config.optim
    assert (optim.epochs, optim.lr, optim.min_lr, optim.warmup_epochs) == (300, 5e-4, 5e-6, 20)
    assert (config.data.batch_size, config.student.drop_path, config.data.mixup) == (128, 0.2, 0.0)
    [trial] = bench.trials(["v"], [1], ["swin_tiny"], ["cifar100"], [False])
    assert bench.trial_config(trial, Path("run")).student.plan == "stage1-2: program(code=v, local_size=0)"


def test_names_that_no_row_has_are_refused(tmp_path: Path, typed: Typed) -> None:
    rows = tmp_path / "rows.jsonl"
    write_rows([Row("digest", program="v", name="values", backbone="plain")], rows)
    for words in ("--program softmax", "--backbone pyramid", "--local without"):
        for action in ("verify", "query"):
            said = typed(f"programs bench {action} {rows} {words}", code=2).err
            assert "has no row that --program, --backbone" in said
    assert "0 of 0 rows" in typed(f"programs bench query {rows} --status failed").out


VICTIM = "../../../victim/x"


@pytest.mark.parametrize(
    ("backbone", "data", "told"),
    [
        (VICTIM, "digits", f"attnbench.backbones: '{VICTIM}'"),
        ("plain", VICTIM, f"attnbench.data: '{VICTIM}'"),
        ("vit/tiny", "digits", "attnbench.backbones: 'vit/tiny'"),
    ],
)
def test_names_are_no_paths(tmp_path: Path, typed: Typed, backbone: str, data: str, told: str) -> None:
    text = SHORT.replace("    plain:", f"    {backbone}:").replace("{digits: {}}", f"{{{data}: {{}}}}")
    (tmp_path / "short.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_bench(tmp_path / "short.yaml")
    words = ["--backbone", backbone, "--local", "with", "--output_dir", str(tmp_path / "bench")]
    assert told in typed("programs", "bench", "run", tmp_path / "short.yaml", *words, code=2).err
    assert [path.name for path in tmp_path.iterdir()] == ["short.yaml"]


def test_two_trials_have_two_folders(tmp_path: Path) -> None:
    text = SHORT.replace("    second:", "    plain-a:").replace("{digits: {}}", "{a-b: {}, b: {}}")
    (tmp_path / "short.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"attnbench: two pairs of a model and data are called 'plain-a-b'"):
        load_bench(tmp_path / "short.yaml")


def test_a_link_in_out_leads_nowhere(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load_bench(recipe)
    trials = bench.trials(["v"], [0], ["plain"], local=[True])
    [cell] = list_cells(bench, trials, tmp_path / "bench", 1)
    kept = tmp_path / "victim" / trials[0].folder / "run" / "kept.txt"
    kept.parent.mkdir(parents=True)
    kept.touch()
    cell.folder.parent.mkdir(parents=True)
    cell.folder.symlink_to(tmp_path / "victim")

    def trained(config: RunConfig) -> RunResult:
        return RunResult({}, config.output_dir, steps=1, finished=True, signal=None)

    monkeypatch.setattr(trial_run, "train", trained)
    monkeypatch.setattr(trial_run, "_measured", lambda row, run: row)
    with pytest.raises(ConfigError, match=r"plain-digits-0-with leads out of .*bench.* by a link"):
        cell.run()
    assert kept.exists()


NAME = "attnbench_digits"
SHIPPED = {NAME: list_programs(list(FOUND), 200, 0), f"{NAME}_long": list_programs([], 72, 0)}
"""Recipes that come with rows, and the programs of their commands in docs/attnbench.md."""


@pytest.mark.parametrize("name", SHIPPED)
def test_rows_are_those_of_the_recipe_as_it_is(name: str) -> None:
    bench, rows = load_bench(name), load_rows(Path(name))
    digests = {name: bench.digest(name, "digits") for name in bench.settings.backbones}
    assert all(row.settings == digests[row.backbone] and row.recipe == name for row in rows)
    assert merge_rows([rows]) == rows


@pytest.mark.parametrize("name", SHIPPED)
def test_rows_have_the_controls_and_drawn_programs_in_all_models(name: str) -> None:
    programs, rows = SHIPPED[name], load_rows(Path(name))
    assert {row.program for row in rows} == set(programs)
    places = {(row.program, row.backbone, row.local) for row in rows}
    assert len(places) == len(rows) == 4 * len(programs)
    assert all(row.status == "trained" for row in rows if row.name in CONTROLS)
    assert all(parse_program(row.program).hash == row.hash for row in rows)
    assert all(row.reason for row in rows if row.status != "trained")


def test_a_file_comes_before_rows_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "4 of 4 rows" in typed("programs", "bench", "query", NAME, "--program", "softmax").out
    typed("programs", "bench", "merge", NAME, "--out", "all.jsonl")
    assert read_rows(Path("all.jsonl")) == load_rows(Path(NAME))
    write_rows([], Path(NAME))
    assert load_rows(Path(NAME)) == []
    with pytest.raises(ConfigError, match="attnbench_none cannot be read: No such file"):
        load_rows(Path("attnbench_none"))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_rows(tmp_path / "all")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backbone"), list(zip(SHIPPED, ("plain", "pyramid"), strict=True)))
def test_a_sample_of_the_rows_verifies_here(name: str, backbone: str, typed: Typed) -> None:
    chosen = "--program softmax" if name == NAME else "--sample 2 --sample_seed 1"
    assert "2 rows agree" in typed(f"programs bench verify {name} --backbone {backbone} {chosen}").out


GOOD = json.loads(row_text(next(row for row in load_rows(Path(NAME)) if row.name == "values")))
Damage = Callable[[dict[str, Any]], str]


def with_changes(**changes: Any) -> Damage:
    return lambda row: json.dumps(row | changes)


def with_point(**changes: Any) -> Damage:
    return lambda row: json.dumps(row | {"curve": [row["curve"][0] | changes]})


DAMAGES: dict[str, Damage] = {
    "too deep": lambda row: "[" * 100_000 + "]" * 100_000,
    "deep inside": lambda row: json.dumps(row | {"curve": "DEEP"}).replace('"DEEP"', "[" * 50_000 + "]" * 50_000),
    "a number of many digits": lambda row: json.dumps(row).replace('"seed": 0', '"seed": ' + "9" * 10_000),
    "an endless seed": with_changes(seed=10**30),
    "a seed below 0": with_changes(seed=-1),
    "no number": with_point(top1=float("nan")),
    "more than all": with_point(top1=1e9),
    "an infinite loss": with_point(loss=float("inf")),
    "an epoch below 0": with_point(epoch=-3),
    "a text in place of a number": with_point(top1="many"),
    "a point of other names": lambda row: json.dumps(row | {"curve": [{"step": 1}]}),
    "endless costs": with_changes(macs=10**400),
    "costs below 0": with_changes(parameters=-1),
    "no latency": with_changes(latency=float("nan")),
    "a status": with_changes(status="best"),
    "a list": lambda row: "[1, 2]",
    "a null": lambda row: "null",
    "no threads": with_changes(environment={"threads": "many"}),
    "no threads at all": with_changes(environment={"threads": "0"}),
    "a long program": with_changes(program="q" * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_row_is_named(how: str, tmp_path: Path, typed: Typed) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + DAMAGES[how](GOOD) + "\n")
    for line in (f"query {path}", f"merge {path} --out {tmp_path}/all.jsonl"):
        with limited_work(60), limited_memory(2 << 30):
            said = typed(f"programs bench {line}", code=2).err
        assert f"{path}, line 2" in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_what_is_no_regular_file(name: str, kind: str, tmp_path: Path, typed: Typed) -> None:
    path = irregular(kind, tmp_path / name)
    with never_waiting(2), limited_memory(2 << 30):
        assert "not a regular file" in typed("programs bench query", path, code=2).err


def test_a_row_runs_no_recipe_that_its_reader_did_not_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    other = tmp_path / "theirs.yaml"
    other.write_text("base: attnbench_digits\n")
    path = tmp_path / "rows.jsonl"
    ran: list[Trial] = []

    def run_trial(bench: Bench, trial: Trial, folder: Path) -> Row:
        ran.append(trial)
        return load_rows(path)[0]

    monkeypatch.setattr(bench_verify, "run_trial", run_trial)
    for recipe in (str(other), "../theirs.yaml", ""):
        path.write_text(json.dumps(GOOD | {"recipe": recipe}))
        assert "--config" in typed("programs", "bench", "verify", path, code=2).err
    assert ran == []
    typed("programs", "bench", "verify", path, "--config", other)
    assert len(ran) == 1


def test_no_row_asks_for_more_threads_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million threads end the process."""
    (row,) = (
        row for row in load_rows(Path(NAME)) if row.name == "values" and row.local and row.backbone == "plain"
    )
    row = replace(row, environment={**row.environment, "threads": "9999"})
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(bench_verify, "run_trial", lambda *_: row)
    assert verify_rows(load_bench(NAME), [row], lambda _: None) == []
    assert asked[0] == os.cpu_count()
