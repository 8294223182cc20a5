"""Run one trial: check its program, train its model from scratch, and measure what the model costs."""

from __future__ import annotations

import math
import platform
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from ...checkpoints.json_lines import read_records
from ...checkpoints.pretrained import load_pretrained
from ...models.cost import attention_macs, other_macs
from ...models.errors import RunFailedError
from ...models.programs.program_checks import CHECKS, check
from ..analysis.benchmark.timing import step_of, time_steps
from ..engine.train import train
from .bench_rows import Point, Row
from .bench_settings import CONTROLS, Bench, Trial

REFUSING = tuple(each for each in CHECKS if each.name not in ("stability", "triviality", "half", "training"))
"""The checks that a program passes before it is trained: those that take milliseconds. Controls are not checked."""
RUN = "run"
"""Of the folder of a trial: the run, until it ends."""
BATCH, ROUNDS = 32, 5
"""Images and rounds of the latency."""


def run_trial(bench: Bench, trial: Trial, folder: Path) -> Row | int:
    """Return the row of a trial, or the signal that stopped its training, which the next call resumes.

    The run is in `folder`, and is removed at its end. Raises GraftError as `train`, but for a loss that is not finite.
    """
    row = _row(bench, trial)
    verdict = check(trial.program, REFUSING)
    if trial.name not in CONTROLS and not verdict.passed:
        return replace(row, status="refused", reason=f"{verdict.check}: {verdict.reason}")
    config = bench.trial_config(trial, folder / RUN)
    try:
        result = train(config)
        if result.signal is not None:
            return result.signal
        row = _measured(row, config.output_dir)
    except RunFailedError as error:
        if "not finite" not in str(error):
            raise
        reason = str(error).partition(";")[0].replace(str(folder), "").strip()
        row = replace(row, status="failed", reason=reason, curve=_curve(config.output_dir))
    shutil.rmtree(folder / RUN, ignore_errors=True)
    return _finite(row)


def _finite(row: Row) -> Row:
    """Return a row that can be written: one with a loss that is no number has failed."""
    curve = tuple(point for point in row.curve if math.isfinite(point.loss))
    if len(curve) == len(row.curve):
        return row
    reason = row.reason or "the loss on the validation split is not finite"
    return replace(row, status="failed", reason=reason, curve=curve)


def environment() -> dict[str, str]:
    """Return what the last digits depend on, beside the settings: the machine, the threads and the packages."""
    return {
        "graftvit": version("graftvit"),
        "torch": torch.__version__,
        "timm": version("timm"),
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    """Return the name of the processor, and the instructions that torch uses."""
    name = platform.processor()
    described = Path("/proc/cpuinfo")
    if described.exists():
        lines = described.read_text(errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} {torch.backends.cpu.get_cpu_capability()}".strip()


def _row(bench: Bench, trial: Trial) -> Row:
    """Return the row of a trial without its measurements."""
    return Row(
        settings=bench.digest(trial.backbone, trial.data),
        program=trial.program,
        hash=trial.hash,
        name=trial.name,
        backbone=trial.backbone,
        data=trial.data,
        seed=trial.seed,
        local=trial.local,
        recipe=bench.recipe,
        environment=environment(),
    )


def _measured(row: Row, run: Path) -> Row:
    """Return the row with the curve of a finished run, and with the cost of its model."""
    loaded = load_pretrained(f"local-dir:{run / 'student'}")
    model = loaded.model.eval()
    images = torch.zeros(BATCH, *loaded.preprocessing.input_size)
    timing = time_steps({"model": step_of(lambda: model(images))}, ROUNDS, torch.device("cpu"))["model"]
    return replace(
        row,
        curve=_curve(run),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=sum(attention_macs(model)) + other_macs(model),
        latency=round(1e3 * timing.median / BATCH, 4),
    )


def _curve(run: Path) -> tuple[Point, ...]:
    """Return the score after each epoch that was evaluated."""
    return tuple(
        Point(int(record["epoch"]) + 1, float(record["test_top1"]), float(record["test_loss"]))
        for record in read_records(run / "log.jsonl")
        if "test_top1" in record and record["step"] > 0
    )
