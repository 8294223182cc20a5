"""The rows of attention programs on digits that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.launch.cli import main
from graftvit.launch.comparison import load_bench, load_rows
from graftvit.models.errors import ConfigError
from graftvit.models.programs.program import FOUND, parse_program
from graftvit.transfer.attnbench.bench_rows import merge_rows, read_rows, write_rows
from graftvit.transfer.attnbench.bench_run import CONTROLS, list_programs

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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["programs", "bench", "query", NAME, "--program", "softmax"]) == 0
    assert "4 of 4 rows" in capsys.readouterr().out
    assert main(["programs", "bench", "merge", NAME, "--out", "all.jsonl"]) == 0
    assert read_rows(Path("all.jsonl")) == load_rows(Path(NAME))
    write_rows([], Path(NAME))
    assert load_rows(Path(NAME)) == []
    with pytest.raises(ConfigError, match="attnbench_none cannot be read: No such file"):
        load_rows(Path("attnbench_none"))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_rows(tmp_path / "all")


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["plain", "pyramid"])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_sample_of_the_rows_verifies_here(
    name: str, backbone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["programs", "bench", "verify", name, "--backbone", backbone]
    for chosen in (["--sample", "2", "--sample_seed", "1"], ["--program", "softmax"])[
        : 2 if name == NAME else 1
    ]:
        assert main([*words, *chosen]) == 0
        assert "2 rows agree" in capsys.readouterr().out
