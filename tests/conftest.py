"""What holds for all tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("graftvit", deadline=None)  # a busy machine is no failure
settings.load_profile("graftvit")


@pytest.fixture(autouse=True)
def level_of_our_log() -> Iterator[None]:
    """Put back after each test: every command sets it for its process."""
    ours = logging.getLogger("graftvit")
    before = ours.level
    yield
    ours.setLevel(before)
