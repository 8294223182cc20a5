"""`python -m benchmarks.targets`, small: what is on the disk, and int8 within its bound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_forms_take_the_bytes_of_their_numbers() -> None:
    command = [sys.executable, "-m", "benchmarks.targets", "--teacher", "test_vit", "--images", "500"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    found = {name: (int(size.replace(",", "")), error) for name, size, _, _, error, *_ in table}
    assert found["classes, exact"][0] == 8 + 4 * 1000
    assert found["patches, int8"][0] == 8 + 100 * (64 + 4)
    assert found["10 largest logits, bf16"][0] == 8 + 2 * 11 + 2 * 10
    assert all(float(error) <= 1.0001 for name, (_, error) in found.items() if name.endswith("int8"))
