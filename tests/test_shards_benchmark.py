"""`python -m benchmarks.shards`, small: ranks that read shards from a server are killed and resumed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_ranks_that_are_killed_read_the_samples_of_an_epoch_that_is_not_stopped() -> None:
    sizes = ["--shards", "8", "--samples", "60", "--step", "12", "--kills", "5"]
    command = [sys.executable, "-m", "benchmarks.shards", "kills", "seek", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(line.strip("| ").split(" | ") for line in done.stdout.splitlines())
    assert found["samples of the epoch"] == "480 of 480"
    assert int(found["kills, each resumed on another number of ranks (1 to 4)"]) >= 3
    assert found["samples that differ from those of the epoch not stopped, are missing or come twice"] == "0"
    assert found["seek to 99 %, 1 sample"].split("; ")[1] == "indexes read: 1"
