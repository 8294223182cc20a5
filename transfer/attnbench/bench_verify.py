"""Run a sample of rows again, and compare."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch

from ...models.errors import ConfigError, RunFailedError
from .bench_rows import Row, describe, disagreement
from .bench_settings import Bench, Trial
from .trial_run import run_trial


def pick_sample(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Return some rows in order, drawn with a seed; all if there are fewer."""
    chosen = sorted(Random(seed).sample(range(len(rows)), min(count, len(rows))))
    return [rows[place] for place in chosen]


def verify_rows(bench: Bench, rows: Sequence[Row], tell: Callable[[str], None]) -> list[str]:
    """Run each row again and return what disagrees, in words; `tell` gets a line for each row.

    It has the threads of the row, or as many as there are processors.

    Raises ConfigError: a row is of other settings than the benchmark. RunFailedError: a signal stopped it.
    """
    for row in rows:
        if row.backbone not in bench.settings.backbones or row.data not in bench.settings.data:
            raise ConfigError(
                f"{bench.recipe} has no {row.backbone} with {row.data}, as the row of {describe(row)}"
            )
        if row.settings != bench.digest(row.backbone, row.data):
            raise ConfigError(
                f"{describe(row)} was run with other settings than those of {bench.recipe}; give its --config"
            )
    found, threads = [], torch.get_num_threads()
    try:
        for row in rows:
            torch.set_num_threads(min(row.threads, os.cpu_count() or 1))
            new = _again(bench, row)
            why = disagreement(row, new)
            same = "bit for bit" if new.environment == row.environment else "within the tolerance"
            tell(f"{describe(row)}: {why or f'agrees {same}'}")
            if why:
                found.append(f"{describe(row)}: {why}")
    finally:
        torch.set_num_threads(threads)
    return found


def _again(bench: Bench, row: Row) -> Row:
    trial = Trial(row.program, row.backbone, row.data, row.seed, row.local)
    with tempfile.TemporaryDirectory() as folder:
        new = run_trial(bench, trial, Path(folder))
    if not isinstance(new, Row):
        raise RunFailedError(f"stopped by signal {new} while {describe(row)} ran again")
    return new
