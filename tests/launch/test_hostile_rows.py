"""A file of rows from somebody else: each damage is one sentence, and a row runs nothing but recipes of the package."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.launch.cli import main
from graftvit.launch.comparison import load_bench, load_rows
from graftvit.transfer.attnbench import bench_run as bench_verify
from graftvit.transfer.attnbench.bench_rows import Row, row_text
from graftvit.transfer.attnbench.bench_run import Bench, Trial, verify_rows
from support.files.irregular_files import irregular, never_waiting
from support.runs.limits import limited_memory, limited_work

NAME = "attnbench_digits"
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
def test_a_row(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + DAMAGES[how](GOOD) + "\n")
    for words in (["query", str(path)], ["merge", str(path), "--out", str(tmp_path / "all.jsonl")]):
        with limited_work(60), limited_memory(2 << 30):
            assert main(["programs", "bench", *words]) == 2
        said = capsys.readouterr().err
        assert f"{path}, line 2" in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_what_is_no_regular_file(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = irregular(kind, tmp_path / name)
    with never_waiting(2), limited_memory(2 << 30):
        assert main(["programs", "bench", "query", str(path)]) == 2
    assert "not a regular file" in capsys.readouterr().err


def test_a_row_runs_no_recipe_that_its_reader_did_not_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
        assert main(["programs", "bench", "verify", str(path)]) == 2
        assert "--config" in capsys.readouterr().err
    assert ran == []
    assert main(["programs", "bench", "verify", str(path), "--config", str(other)]) == 0
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
