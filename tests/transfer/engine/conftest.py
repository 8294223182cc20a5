"""Runs of the engine are evaluated on few digits."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def every_run_has(few_digits: None) -> None:
    """Evaluate each run on few digits."""
