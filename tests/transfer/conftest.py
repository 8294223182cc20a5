"""What tests of runs share: two teachers, and for a worker a server that forks runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs.engine_runs import make_convnext, make_teacher
from support.runs.scenarios import RunScenario, scenario_server


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head of ten classes."""
    return make_teacher(tmp_path_factory.mktemp("teachers") / "teacher")


@pytest.fixture(scope="module")
def convnext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_convnext(tmp_path_factory.mktemp("teachers") / "convnext")


@pytest.fixture(scope="session")
def run_scenario() -> Iterator[RunScenario]:
    with scenario_server() as run:
        yield run
