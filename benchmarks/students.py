"""Time a step of three students in one run against the teacher's pass and the students' own steps, into docs/runs.md.

OMP_NUM_THREADS=1 python -m benchmarks.students

A student's own step is that of the run that it is alone, less reading and the teacher's pass, timed apart. All times
are processor time, taken in turn in each round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.transfer.analysis.report.tables import Table
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.build import build, one_teacher
from graftvit.transfer.engine.parallel import create_accelerator
from graftvit.transfer.engine.train import company, training

from .marked import put_between_marks

PAGE = Path(__file__).parent.parent / "docs" / "runs.md"
MODEL: dict[str, Any] = {"img_size": 112, "patch_size": 8, "in_chans": 1, "num_classes": 10}
"""ViT-Ti with 197 tokens of images of digits."""
SECTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "distill": {
        f"weight {weight}": {
            "student": {"init": "teacher"},
            "transfer": {"method": "distill", "weight": weight},
        }
        for weight in (1.0, 3.0, 10.0)
    },
    "align": {
        name: {"mode": "align", "student": {"plan": f"*: {name}"}}
        for name in ("linear", "hedgehog", "focused")
    },
}


def main() -> None:
    """Time both modes and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    rows = []
    for kind, sections in SECTIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append([kind, *measure(Path(folder), sections, rounds)])
    head = [
        "three students",
        "teacher, ms",
        "own steps, ms",
        "together, ms",
        "together / (teacher + own steps)",
    ]
    put_between_marks(PAGE, "students", Table(head, rows).to_markdown())


def config(folder: Path, sections: dict[str, Any]) -> RunConfig:
    """Return a run that neither evaluates nor saves within the rounds."""
    base: dict[str, Any] = {
        "output_dir": folder / "run",
        "teacher": {"source": f"local-dir:{folder / 'teacher'}"},
        "data": {"dataset": "digits", "batch_size": 4, "workers": 0, "val_split": None, "aa": "affine"},
        "optim": {"epochs": 100, "lr": 1e-4},
        "engine": {
            "device": "cpu", "log_interval": 10_000, "trackers": (), "progress": False, "report": False,
            "evaluate_teacher": False,
        },
    }  # fmt: skip
    return RunConfig.model_validate({**base, **sections})


def measure(folder: Path, sections: dict[str, dict[str, Any]], rounds: int) -> list[str]:
    """Return milliseconds of the teacher's pass, of the own steps and of a common step, and their ratio."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **MODEL)
    spec = Preprocessing.of(model, mean=(0.5,), std=(0.5,))
    write_student(
        model, folder / "teacher", architecture="vit_tiny_patch16_224", model_args=MODEL, preprocessing=spec
    )
    configs = {name: config(folder, own) for name, own in sections.items()}
    first = next(iter(configs.values()))
    with ExitStack() as stack:
        alone = [started(stack, [each], f"alone-{number}") for number, each in enumerate(configs.values())]
        together = started(stack, list(configs.values()), "together")
        parts = build(first)
        batches = parts.train_loader.epoch(0)

        def read_and_teach() -> None:
            parts.task.teach(next(batches)[0])

        steps = [read_and_teach, *alone, together]
        for step in steps:
            step()
        times = [[seconds(step) for step in steps] for _ in range(rounds)]
    ratios, rows = [], []
    for teacher, *singles, common in times:
        own = sum(singles) - len(singles) * teacher
        rows.append((1e3 * teacher, 1e3 * own, 1e3 * common))
        ratios.append(common / (teacher + own))
    low, middle, high = statistics.quantiles(ratios)
    medians = [f"{statistics.median(values):.0f}" for values in zip(*rows, strict=True)]
    return [*medians, f"{middle:.3f} ({low:.3f} to {high:.3f})"]


def started(stack: ExitStack, configs: list[RunConfig], name: str) -> Callable[[], None]:
    """Return a function that does the next step of runs that share what they can."""
    accelerators = [create_accelerator(each) for each in configs]
    several = len(configs) > 1
    others = stack.enter_context(company(configs[0], accelerators[0], several=several))
    runs = [
        stack.enter_context(closing(training(
            each.model_copy(update={"output_dir": each.output_dir / name / str(number)}), accelerator, others
        )))
        for number, (each, accelerator) in enumerate(zip(configs, accelerators, strict=True))
    ]  # fmt: skip

    def step() -> None:
        for run in runs:
            next(run)

    with one_teacher():
        step()  # builds them
    return step


def seconds(step: Callable[[], None]) -> float:
    """Return the processor time of a step."""
    before = time.process_time()
    step()
    return time.process_time() - before


if __name__ == "__main__":
    main()
