"""The script that compares two checkouts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="a checkout has its environment in .venv")
def test_a_checkout_is_compared_with_itself() -> None:
    words = [sys.executable, "-m", "benchmarks.checkouts", ".", ".", "--models", "vit", "--rounds", "2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [line[:3] for line in lines] == [
        ["vit", kind, what] for kind in ("hosted", "linear") for what in ("forward", "step")
    ]
    assert all(float(number) > 0 for line in lines for number in line[3:])
