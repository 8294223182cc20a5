"""A server that forks the processes of runs, one for all tests of a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scenarios import RunScenario, scenario_server


@pytest.fixture(scope="session")
def run_scenario() -> Iterator[RunScenario]:
    with scenario_server() as run:
        yield run
