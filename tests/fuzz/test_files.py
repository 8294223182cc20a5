"""Two hundred damaged files of all formats: each is read with the right numbers, or refused in one sentence."""

from __future__ import annotations

from collections import Counter

import pytest
from fuzz.files import run
from fuzz.formats import FORMATS

COUNT = 200


@pytest.mark.slow
def test_damaged_files() -> None:
    results = list(run(COUNT, seed=1))
    assert len(results) == COUNT
    assert [result for result in results if result["outcome"] not in ("read", "refused")] == []
    assert Counter(result["format"] for result in results).keys() == FORMATS.keys()
