"""What the tests of the engine share: a teacher for a file, and for a worker a server that forks runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_runs import make_teacher
from graftvit.transfer.data import digits
from scenarios import RunScenario, scenario_server


@pytest.fixture(scope="module", autouse=True)
def few_digits() -> Iterator[None]:
    """Measure on the first hundred of the 500 test digits, which take a third of the time of a short run."""
    read = digits._read_split

    def fewer(split: str) -> tuple[np.ndarray, ...]:
        return tuple(part[:100] if split == "validation" else part for part in read(split))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_read_split", fewer)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head of ten classes."""
    return make_teacher(tmp_path_factory.mktemp("teachers") / "teacher")


@pytest.fixture(scope="session")
def run_scenario() -> Iterator[RunScenario]:
    with scenario_server() as run:
        yield run
