"""`graftvit programs bench`, as typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.cli import main
from graftvit.launch.comparison import load_bench
from graftvit.models.errors import ConfigError
from graftvit.models.programs.program import parse_program
from graftvit.transfer.attnbench import bench_run as bench_settings
from graftvit.transfer.attnbench import bench_run as trial_run
from graftvit.transfer.attnbench.bench_rows import Row, read_rows, write_rows
from graftvit.transfer.attnbench.bench_run import CONTROLS, list_cells, list_programs
from graftvit.transfer.config import OptimConfig, RunConfig
from graftvit.transfer.engine.train import RunResult
from support.runs.engine_runs import make_teacher

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
def test_rows_are_run_extended_merged_queried_and_verified(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ["--backbone", "plain", "--local", "with"]
    assert main(["programs", "bench", "run", recipe, "--output_dir", str(tmp_path / "a"), *first]) == 0
    rows = read_rows(tmp_path / "a" / "rows.jsonl")
    assert {row.name for row in rows} == set(CONTROLS)
    assert all(row.status == "trained" and [p.epoch for p in row.curve] == [1, 2] for row in rows)
    assert not list((tmp_path / "a").rglob("run"))
    again = ["--program", "mul(q v)", "--processes", "2"]
    assert (
        main(["programs", "bench", "run", recipe, "--output_dir", str(tmp_path / "a"), *first, *again]) == 0
    )
    assert len(read_rows(tmp_path / "a" / "rows.jsonl")) == len(CONTROLS) + 1
    assert main(["programs", "bench", "run", recipe, "--output_dir", str(tmp_path / "a"), *first]) == 0
    assert len(read_rows(tmp_path / "a" / "rows.jsonl")) == len(CONTROLS) + 1, "rows of earlier commands stay"

    more = ["--program", "mul(q v)", "--program", "attnzero_105", "--processes", "2"]
    words = [
        "programs",
        "bench",
        "extend",
        str(tmp_path / "a" / "rows.jsonl"),
        recipe,
        "--backbone",
        "plain",
        *more,
    ]
    assert main([*words, "--output_dir", str(tmp_path / "b")]) == 0
    both = read_rows(tmp_path / "b" / "rows.jsonl")
    assert len(both) == 2 * (len(CONTROLS) + 2)
    assert {outcome(row) for row in rows} <= {outcome(row) for row in both}
    assert not (tmp_path / "b" / "cells" / rows[0].hash / "plain-digits-0-with").exists()
    refused = [row for row in both if row.status == "refused"]
    assert {(row.program, row.reason.partition(":")[0]) for row in refused} == {("mul(q v)", "gradients")}

    files = [str(tmp_path / folder / "rows.jsonl") for folder in ("b", "a")]
    assert main(["programs", "bench", "merge", *files, "--out", str(tmp_path / "all.jsonl")]) == 0
    assert read_rows(tmp_path / "all.jsonl") == both
    capsys.readouterr()
    assert (
        main(["programs", "bench", "query", str(tmp_path / "all.jsonl"), "--program", "values", "--json"])
        == 0
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["program"] for line in lines] == ["v", "v"]
    assert (
        main(
            ["programs", "bench", "verify", str(tmp_path / "all.jsonl"), "--config", recipe, "--sample", "3"]
        )
        == 0
    )
    assert "3 rows agree" in capsys.readouterr().out

    changed = (tmp_path / "all.jsonl").read_text().replace('"loss": ', '"loss": 1')
    (tmp_path / "all.jsonl").write_text(changed)
    words = ["programs", "bench", "verify", str(tmp_path / "all.jsonl"), "--config", recipe, "--sample", "1"]
    words += ["--program", "values"]
    assert main(words) == 1
    assert "1 of 1 row differ" in capsys.readouterr().err


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


def test_names_that_no_row_has_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    write_rows([Row("digest", program="v", name="values", backbone="plain")], rows)
    for words in (["--program", "softmax"], ["--backbone", "pyramid"], ["--local", "without"]):
        for action in ("verify", "query"):
            assert main(["programs", "bench", action, str(rows), *words]) == 2
            assert "has no row that --program, --backbone" in capsys.readouterr().err
    assert main(["programs", "bench", "query", str(rows), "--status", "failed"]) == 0
    assert "0 of 0 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["rum"], "unknown action 'rum'; did you mean 'run'?"),
        (["run", "digits_scratch", "--output_dir", "x"], "digits_scratch has no section 'attnbench'"),
        (["run", "attnbench_digits", "--output_dir", "x", "--backbone", "plane"], "--backbone plane"),
        (
            ["run", "attnbench_digits", "--output_dir", "x", "--program", "mul(q"],
            "the parenthesis of mul is not closed",
        ),
        (
            ["run", "attnbench_digits", "--output_dir", "x", "--drawn", "-1"],
            "--drawn: give a whole number from 0",
        ),
        (
            ["run", "attnbench_digits", "--output_dir", "x", "--threads", "0"],
            "--threads: give a whole number, 1 or more",
        ),
        (
            ["run", "attnbench_digits", "--output_dir", "x", "--seeds", "-2"],
            "--seeds: give a whole number from 0 to 9,223,372,036,854,775,807",
        ),
        (["run", "attnbench_digits"], "--output_dir"),
        (["merge", "none.jsonl", "--out", "x.jsonl"], "none.jsonl cannot be read"),
        (["query", "rows.jsonl", "--top", "-1"], "--top: give a whole number, 0 or more"),
        (["verify", "rows.jsonl", "--sample", "0"], "--sample: give a whole number, 1 or more"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["programs", "bench", *words]) == 2
    assert reason in capsys.readouterr().err


VICTIM = "../../../victim/x"


@pytest.mark.parametrize(
    ("backbone", "data", "told"),
    [
        (VICTIM, "digits", f"attnbench.backbones: '{VICTIM}'"),
        ("plain", VICTIM, f"attnbench.data: '{VICTIM}'"),
        ("vit/tiny", "digits", "attnbench.backbones: 'vit/tiny'"),
    ],
)
def test_names_are_no_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], backbone: str, data: str, told: str
) -> None:
    text = SHORT.replace("    plain:", f"    {backbone}:").replace("{digits: {}}", f"{{{data}: {{}}}}")
    (tmp_path / "short.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_bench(tmp_path / "short.yaml")
    words = ["--backbone", backbone, "--local", "with", "--output_dir", str(tmp_path / "bench")]
    assert main(["programs", "bench", "run", str(tmp_path / "short.yaml"), *words]) == 2
    assert told in capsys.readouterr().err
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
