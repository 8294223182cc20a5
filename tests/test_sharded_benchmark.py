"""`python -m benchmarks.sharded`, small: what a rank holds, as a part of the weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.runs.scenarios import NEEDS_FSDP

ROOT = Path(__file__).parents[1]


@NEEDS_FSDP
@pytest.mark.slow
def test_a_rank_holds_its_share_and_few_whole_tensors() -> None:
    sizes = ["--ranks", "2", "--depth", "8", "--width", "64", "--saves", "1"]
    command = [sys.executable, "-m", "benchmarks.sharded", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    shares = {row[0]: float(row[3]) for row in rows if len(row) == 4 and row[0].endswith(("load", "export"))}
    assert max(share for name, share in shares.items() if name.endswith("load")) < 1.15, shares
    assert shares["student, at export"] < 2.0, shares  # with a whole student it would be 3
    assert sum(row[0] == "beside the training" for row in rows) == 1
