"""A benchmark goes on where it was stopped, and ends with tables and a plot."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from graftvit.models.errors import ConfigError
from graftvit.transfer.analysis.benchmark import check_device, draw_latency, make_report, run_cases
from graftvit.transfer.analysis.benchmark_cases import Case, Results, Row, drifted, load_results
from support.runs.benchmark_rows import case, row

CASES = [case(name, size) for size in (64, 256, 1024) for name in ("linear", "ttt")]


def measured(one: Case) -> Row:
    """Softmax takes the same time in all rows of a size."""
    softmax = 0.01 * one.size / 128
    return dataclasses.replace(
        row(), case=one, softmax=softmax, median=0.01 if one.name == "linear" else 4 * softmax
    )


def test_a_reference_that_drifted_is_measured_again_and_at_last_marked(tmp_path: Path) -> None:
    cases = [case(name, 64) for name in ("linear", "ttt", "window", "none", "mala")]
    seen: list[Case] = []

    def busy(one: Case) -> Row:
        seen.append(one)
        slow = one.name == "window" or (one.name == "linear" and seen.count(one) == 1)
        return dataclasses.replace(
            measured(one), softmax=0.05 if slow else 0.006, cpu=0.002, softmax_cpu=0.001
        )

    told: list[str] = []
    results = run_cases("operators", cases, busy, tmp_path, tell=told.append)
    assert [each.name for each in seen[5:]] == ["linear", "window", "window"]
    assert any("softmax took 50 ms, in other rows not: again" in line for line in told)
    assert [each.name for each in (found.case for found in drifted(results.rows))] == ["window"]
    table = (tmp_path / "table.md").read_text()
    assert "| window | 20 | 9–12 | 2 | 50† | 1 | 2.50† |" in table
    assert "† softmax took another time than in the other rows" in table
    assert "| linear |" in table
    kept = (tmp_path / "results.csv").read_text().splitlines()
    assert [line.rpartition(",")[2] for line in kept] == [
        "drifted",
        "False",
        "False",
        "True",
        "False",
        "False",
    ]


def test_a_stopped_benchmark_goes_on(tmp_path: Path) -> None:
    seen: list[Case] = []

    def stops(one: Case) -> Row:
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(one)
        return measured(one)

    with pytest.raises(KeyboardInterrupt):
        run_cases("operators", CASES, stops, tmp_path)
    assert [saved.case for saved in load_results(tmp_path, "operators").rows] == CASES[:4]
    seen.clear()
    results = run_cases("operators", CASES, stops, tmp_path)
    assert seen == CASES[4:]
    assert [saved.case for saved in results.rows] == CASES
    run_cases("operators", CASES[:1], stops, tmp_path, force=True)
    assert len(load_results(tmp_path, "operators").rows) == 1


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    run_cases("operators", CASES, measured, tmp_path, tell=told.append)
    assert "[6/6] ttt, 1,024 tokens, batch 1, float32, cpu, forward" in told
    told.clear()
    run_cases("operators", CASES, measured, tmp_path, tell=told.append)
    assert told == ["6 of 6 cells are done"]


def test_the_tables_say_ratio_and_crossover(tmp_path: Path) -> None:
    run_cases("operators", CASES, measured, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "## 1,024 tokens, 6 heads of 64, batch 1, float32, cpu, forward" in table
    assert "| linear | 10 | 9–12 | 80 | 8.00 | 100.0 | 1.0 | 5.0 | 5.0 |" in table
    assert "| operator | 6 heads of 64, batch 1, float32, cpu, forward |" in table
    assert "| linear | 128 |\n| ttt | above 1,024 |" in table
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_only_what_was_asked_for(tmp_path: Path) -> None:
    run_cases("operators", CASES, measured, tmp_path)
    run_cases("operators", CASES[:2], measured, tmp_path)
    assert "1,024" not in (tmp_path / "table.md").read_text()
    assert len(load_results(tmp_path, "operators").rows) == 6, "but nothing is forgotten"


def test_a_wrong_account_of_multiply_adds_is_named() -> None:
    wrong = dataclasses.replace(row("ttt"), counted_macs=4_000_000)
    text = make_report(Results("operators", "here", [row(), wrong])).to_markdown()
    assert "More than 5%" in text
    assert text.rstrip().endswith(": ttt.")


def test_the_plot_has_a_panel_a_setting_and_rings_at_crossovers() -> None:
    rows = [measured(one) for one in CASES]
    rows += [dataclasses.replace(one, case=dataclasses.replace(one.case, batch=8)) for one in rows]
    panels = draw_latency(rows).axes
    assert [panel.get_title() for panel in panels] == [
        f"6 heads of 64, batch {batch}, float32, cpu, forward" for batch in (1, 8)
    ]
    rings = [line for line in panels[0].lines if len(line.get_xdata()) == 1]
    assert [float(ring.get_xdata()[0]) for ring in rings] == [pytest.approx(128)]
    assert panels[0].get_xscale() == panels[0].get_yscale() == "log"


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert check_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="--device cuda"):
        check_device("cuda")
