"""Sweeps on the disk as runs would leave them, with the numbers that a test asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from graftvit.launch.slurm.folder import JobFolder
from graftvit.launch.sweep import parse_sweep


def make_sweep(folder: Path, *words: str) -> list[Path]:
    """The cells."""
    sweep = parse_sweep(words, folder)
    sweep.save()
    return list(sweep.cells)


def write_run(
    cell: Path,
    top1: Sequence[float | None] = (),
    *,
    ema: Sequence[float] = (),
    loss: float = 1.0,
    student: bool = True,
    epochs: int = 2,
    max_steps: int | None = None,
    stage: str = "",
) -> None:
    """A run of ten steps an epoch, an epoch for each value of `top1`; None where it was not evaluated."""
    run = cell / stage
    run.mkdir(parents=True, exist_ok=True)
    optim, total = {"epochs": epochs, "max_steps": max_steps}, max_steps or 10 * epochs
    (run / "config.yaml").write_text(yaml.safe_dump({"output_dir": str(run), "optim": optim}))
    records: list[dict[str, float]] = [{"epoch": 0, "step": 0, "test_top1": 99.0, "teacher_top1": 99.0}]
    for epoch, value in enumerate(top1):
        steps = 10 * (epoch + 1)
        records.append({"epoch": epoch, "step": steps - 5, "train_loss": 77.0})
        scores = {} if value is None else {"test_top1": value}
        scores |= {"test_ema_top1": ema[epoch]} if ema else {}
        train = {"train_loss": loss + len(top1) - epoch - 1, "n_parameters": 5, "total_steps": total}
        records.append({"epoch": epoch, "step": steps, **train, **scores})
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if student:
        (cell / "student").mkdir(exist_ok=True)


def write_attempt(cell: Path, outcome: str | None, why: str = "") -> None:
    cell.mkdir(parents=True, exist_ok=True)
    jobs = JobFolder(cell)
    name = jobs.begin(job_id="7_1", restart=0, nodes=["n1"], world_size=1)
    if outcome is not None:
        jobs.note(name, outcome=outcome, why=why)
