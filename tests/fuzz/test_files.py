"""Two hundred damaged files of all formats: each is read with the right numbers, or refused in one sentence."""

from __future__ import annotations

from collections import Counter

import pytest
from fuzz.files import run
from fuzz.formats import FORMATS

COUNT, SHARES = 200, 2


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_damaged_files(share: int) -> None:
    cases = COUNT // SHARES
    results = list(run(cases, seed=1, first=share * cases))
    assert len(results) == cases
    assert [result for result in results if result["outcome"] not in ("read", "refused")] == []
    assert Counter(result["format"] for result in results).keys() == FORMATS.keys()
