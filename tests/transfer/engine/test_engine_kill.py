"""A run that is killed or asked to stop ends, once resumed, as if nothing had happened: bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.runs.scenarios import RunScenario

NEEDS_FSDP = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on a CPU"
)
FSDP = pytest.param("fsdp", marks=NEEDS_FSDP)


@pytest.mark.slow
def test_ten_kills_leave_no_trace(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("engine_killer", "kill", tmp_path, 1, "single")
    assert report["disturbed"] == 10, report
    assert report["last"] == [0], report
    assert report["differences"] == []


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", FSDP])
def test_killed_ranks_leave_no_trace(run_scenario: RunScenario, tmp_path: Path, wrap: str) -> None:
    """With three losses of two teachers, one of them a ConvNeXt."""
    report = run_scenario("engine_killer", "kill", tmp_path, 2, wrap)
    assert report["disturbed"] == 4, report
    assert report["last"] == [0, 0], report
    assert report["differences"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "wrap"), [(1, "single"), (2, "ddp"), pytest.param(2, "fsdp", marks=NEEDS_FSDP)]
)
def test_a_termination_of_one_rank_saves_and_stops_all(
    run_scenario: RunScenario, tmp_path: Path, ranks: int, wrap: str
) -> None:
    report = run_scenario("engine_killer", "terminate", tmp_path, ranks, wrap)
    assert report["disturbed"] == 2, report
    assert report["last"] == [0] * ranks, report
    assert report["differences"] == []


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", FSDP])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_its_layer(
    run_scenario: RunScenario, tmp_path: Path, wrap: str
) -> None:
    report = run_scenario("engine_killer", "poison", tmp_path, 2, wrap)
    assert report["ends"] == [1, 1], report
    assert report["texts"][0] == report["texts"][1]
    assert "not finite at step 4 (in layer01)" in report["texts"][0]
    assert "the last good state is that of step 3" in report["texts"][0]
    assert report["finite"]
    assert report["last"] == [0, 0], report


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_rank_stops_all(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("engine_killer", "starve", tmp_path, 2, "ddp")
    assert report["ends"] == [1, 1], report
    assert report["texts"][0] == report["texts"][1]
    assert "\n" not in report["texts"][0]
    assert report["last"] == [0, 0], report


@NEEDS_FSDP
@pytest.mark.slow
def test_a_run_stopped_under_ddp_goes_on_under_fsdp(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("engine_killer", "rewrap", tmp_path, 2, "ddp")
    assert report["ends"] == [[115, 115], [0, 0]], report
    assert report["same_names"]
    assert report["gap"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "wrap"), [(1, "single"), (2, "ddp"), pytest.param(2, "fsdp", marks=NEEDS_FSDP)]
)
def test_clocks_that_differ_save_together_and_leave_no_trace(
    run_scenario: RunScenario, tmp_path: Path, ranks: int, wrap: str
) -> None:
    report = run_scenario("engine_killer", "clock", tmp_path, ranks, wrap)
    assert report["ends"] == [[0] * ranks, [-9] * ranks, [0] * ranks], report
    assert all(steps == report["saved"][0] for steps in report["saved"]), report
    between = {int(step) for step in report["saved"][0] if int(step) % (8 if ranks == 1 else 4)}
    assert len(between) >= 2, report
    assert report["differences"] == []
