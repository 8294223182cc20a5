"""One cache and several processes: killed in the middle, two runs at once, two ranks, loader processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from graftvit.transfer.cache.target_shards import ShardLock, write_once
from support.runs.scenarios import RunScenario, scenario_server

NONE = {"one": [], "two": []}
BATCHES = 2 * (5 * 2 + 1)
"""Two views of six files; a file of 24 images is two batches, the last one of ten images is one."""


@pytest.fixture(scope="module")
def run_scenario() -> Iterator[RunScenario]:
    with scenario_server() as run:
        yield run


@pytest.mark.slow
def test_a_killed_run_resumes_after_its_whole_files(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("engine_cache", "killed", tmp_path)
    assert report["ends"] == [[0], [-signal.SIGKILL], [-signal.SIGKILL], [0], [0]], report
    assert report["kept"] == 1 + 2
    assert report["passes"] == [BATCHES - 2 * 3, 0]
    assert report["differences"] == NONE
    assert report["left"] == []


@pytest.mark.slow
def test_two_runs_at_once_compute_each_file_once(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("engine_cache", "beside", tmp_path)
    assert report["ends"] == [[0]] * 5, report
    assert report["both"] == BATCHES
    assert report["passes"] == [0, 0]
    assert report["differences"] == NONE
    assert report["other"] == []
    assert report["left"] == []


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["ranks", "workers"])
def test_ranks_and_loader_processes_share_a_cache(
    scenario: str, run_scenario: RunScenario, tmp_path: Path
) -> None:
    report = run_scenario("engine_cache", scenario, tmp_path)
    ends = [0, 0] if scenario == "ranks" else [0]
    assert report["ends"] == [ends] * 3, report
    assert report["passes"][0] == {"ranks": 2 * (5 * 3 + 2), "workers": BATCHES}[scenario]
    assert report["passes"][1] == 0
    assert report["differences"] == NONE
    assert report["left"] == []


def test_a_file_that_all_write_is_written_by_one(tmp_path: Path) -> None:
    path = tmp_path / "about.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_once, [path] * 64, [str(number) for number in range(64)]))
    assert path.read_text().isdecimal()
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_is_of_one_process_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "view-000" / "shard"
    lock = ShardLock.take(path)
    assert lock is not None
    assert ShardLock.take(path) is None
    lock.free()
    again = ShardLock.take(path)
    assert again is not None
    again.free()
    assert list(path.parent.iterdir()) == []
