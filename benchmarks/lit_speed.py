"""Time LIT-S and LITv2-S beside timm's Swin-T and PVTv2-B2, forward and training step, into docs/lit.md.

OMP_NUM_THREADS=1 python -m benchmarks.lit_speed     minutes on a core that nothing else uses
python -m benchmarks.lit_speed --report              write the page from the results that are there
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import graftvit.models.lit  # noqa: F401 - registers the models
import timm
import torch
from graftvit.transfer.analysis.benchmark_cases import Step, Timing, keep_freed_memory, time_steps
from graftvit.transfer.analysis.report.tables import Table
from torch import nn

from .marked import put_between_marks

PAGE = Path(__file__).parent.parent / "docs" / "lit.md"
RESULTS = Path(__file__).parent / "results" / "lit_speed.json"
REFERENCE = "swin_tiny_patch4_window7_224"
MODELS = ("lit_s", "litv2_s", REFERENCE, "pvt_v2_b2")
CASES = ((224, 4), (448, 1))
"""Image sides, and the batch that has as many pixels at each."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.lit_speed", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if not arguments.report:
        keep_freed_memory()
        rows = [row for size, batch in CASES for row in measure(size, batch, arguments.repeats)]
        found = {"machine": machine(), "repeats": arguments.repeats, "rows": rows}
        arguments.results.write_text(json.dumps(found, indent=1) + "\n")
    result = json.loads(arguments.results.read_text())
    put_between_marks(arguments.page, "speed", f"{table(result)}\n\n{result['machine']}.")
    print(f"{arguments.page} has {len(result['rows'])} timings")


def measure(size: int, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Return the seconds of an image for each model, forward and step, all in the same rounds."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    steps: dict[str, Step] = {}
    for name in MODELS:
        steps[f"{name} forward"] = forward_of(create(name, size).eval(), images)
        steps[f"{name} step"] = training_step(create(name, size).train(), images, labels)
    print(f"{size} px, batch {batch}: {len(steps)} timings in {repeats} rounds", flush=True)
    timings = time_steps(steps, repeats, torch.device("cpu"))
    return [row(*name.split(), size, batch, timing) for name, timing in timings.items()]


def row(model: str, kind: str, size: int, batch: int, timing: Timing) -> dict[str, Any]:
    seconds = [value / batch for value in (timing.median, timing.low, timing.high)]
    return {"model": model, "kind": kind, "size": size, "batch": batch, "seconds": seconds}


def create(name: str, size: int) -> nn.Module:
    """Return a model with random weights; PVTv2 takes images of any size."""
    sized = {} if name.startswith("pvt_v2") else {"img_size": size}
    return timm.create_model(name, drop_path_rate=0.0, **sized)


def forward_of(model: nn.Module, images: torch.Tensor) -> Step:
    def forward() -> None:
        with torch.no_grad():
            model(images)

    return forward


def training_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Step:
    """Return forward, cross-entropy, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def table(result: dict[str, Any]) -> str:
    """Return a row for each model: ms an image, and in parentheses Swin-T's time over it."""
    columns = {(each["kind"], each["size"]): f"{each['kind']}, {each['size']} px" for each in result["rows"]}
    cells: dict[str, list[str]] = {f"`{model}`": [] for model in MODELS}
    for kind, size in sorted(columns, key=lambda column: (column[1], column[0])):
        rows = [each for each in result["rows"] if (each["kind"], each["size"]) == (kind, size)]
        seconds = {each["model"]: each["seconds"][0] for each in rows}
        for model in MODELS:
            ratio = seconds[REFERENCE] / seconds[model]
            cells[f"`{model}`"].append(f"{1e3 * seconds[model]:,.0f} ({ratio:.2f})")
    head = ["model", *(columns[at] for at in sorted(columns, key=lambda column: (column[1], column[0])))]
    return (
        Table(head, [[model, *values] for model, values in cells.items()]).to_markdown().replace("\\`", "`")
    )


def machine() -> str:
    """Describe what it was measured on."""
    load = os.getloadavg()[0]
    return (
        f"{torch.get_num_threads()} thread, {platform.machine()}, torch {torch.__version__.split('+')[0]}, timm "
        f"{timm.__version__}; load average {load:.1f} on {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
