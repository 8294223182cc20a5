"""Results are kept as they are, and are of one kind and one machine."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from graftvit.models.errors import ConfigError
from graftvit.transfer.analysis import benchmark_cases as cases
from graftvit.transfer.analysis.benchmark_cases import Results, load_results, machine
from support.runs.benchmark_rows import case, row


def test_they_come_back_as_they_were(tmp_path: Path) -> None:
    saved = Results("operators", machine(), [row(), row("ttt", backward=True)])
    saved.save(tmp_path)
    found = load_results(tmp_path, "operators")
    assert found == saved
    assert found.state(case("ttt", backward=True)) == "done"
    assert found.state(case("ttt")) == "to do"


def test_the_csv_has_every_number(tmp_path: Path) -> None:
    Results("operators", "here", [row(ratio=2.5), row("kernel(feature=relu, window=3)")]).save(tmp_path)
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert lines[0]["ratio"] == "2.5000"
    assert lines[0]["median"] == "0.01"
    assert lines[1]["name"] == "kernel(feature=relu, window=3)"
    assert len(lines[0]) == 10 + 12


def test_a_folder_without_results_has_none(tmp_path: Path) -> None:
    assert load_results(tmp_path / "new", "models").rows == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": "operators", "machine": "x", "rows": [{"case": {}}]}']
)
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ConfigError, match=r"results\.json is no file of benchmark results"):
        load_results(tmp_path, "operators")


def test_results_of_another_kind_or_machine_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Results("operators", machine(), [row()]).save(tmp_path)
    with pytest.raises(ConfigError, match="--force"):
        load_results(tmp_path, "models")
    monkeypatch.setattr(cases, "machine", lambda: "a faster one")
    with pytest.raises(ConfigError, match="a faster one"):
        load_results(tmp_path, "operators")
