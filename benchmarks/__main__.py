"""Run the benchmarks and write a table and JSON.

python -m benchmarks                          ViT-S on this machine, a quarter of an hour on two cores
python -m benchmarks --models ViT-B --tokens 577 1025 --name cpu-large
python -m benchmarks --keep_freed_memory      the same where the C library keeps freed memory
python -m benchmarks --quick                  one short case, to see that it runs
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from graftvit.transfer.analysis.benchmark_cases import keep_freed_memory, peak_bytes, time_steps
from graftvit.transfer.analysis.report.tables import tabulate

from .steps import DENSE, MODELS, OURS, SIDES, Case, build_steps, floor, format_ratio

TOKENS_A_STEP = 2305  # the batch is chosen so that each step has about as many tokens
RESULTS = Path(__file__).parent / "results"
Columns = dict[str, Callable[[dict[str, Any]], object]]


def main() -> None:
    arguments = parse()
    if arguments.keep_freed_memory:
        keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for case in cases(arguments):
        print(case.describe(), flush=True)
        rows.append(measure(case, arguments.repeats))
        print(f"  bound {rows[-1]['bound_seconds']:.3f} s, {ratios(rows[-1])}", flush=True)
        result = {
            "machine": machine(),
            "repeats": arguments.repeats,
            "rows": rows,
            "exponents": exponents(rows),
        }
        write(arguments.output / arguments.name, result)
    print(f"\n{table(result)}\nwritten to {arguments.output / arguments.name}.md and .json")


def ratios(row: dict[str, Any]) -> str:
    """Return each step's time over the bound, and its least by operations."""
    least = {name: f" (floor {value:.3f})" for name, value in row["floor"].items()}
    return ", ".join(f"{name} {ratio:.3f}{least.get(name, '')}" for name, ratio in row["ratio"].items())


def write(name: Path, result: dict[str, Any]) -> None:
    """Write the table and its numbers, after each case, so that a run that is stopped keeps the cases before."""
    name.parent.mkdir(parents=True, exist_ok=True)
    name.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    name.with_suffix(".md").write_text(table(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["ViT-S"])
    parser.add_argument("--tokens", nargs="+", type=int, choices=SIDES, default=[197, 577, 1025, 2305])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="ViT-S at 197 tokens, three repeats")
    parser.add_argument(
        "--keep_freed_memory",
        action="store_true",
        help="do not return freed memory to the system, which gives it back page by page (glibc)",
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of the files with results (default: cuda, cpu or cpu_kept)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.tokens, arguments.repeats = ["ViT-S"], [197], 3
        arguments.name = arguments.name or "quick"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.name = arguments.name or device + "_kept" * arguments.keep_freed_memory
    return arguments


def cases(arguments: argparse.Namespace) -> list[Case]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    factor = 16 if device.type == "cuda" else 1
    found = []
    for model in arguments.models:
        for tokens in arguments.tokens:
            if model == "ViT-B" and tokens > 1025 and device.type == "cpu":
                continue  # minutes a step
            batch = max(1, factor * TOKENS_A_STEP // tokens)
            found += [Case(model, tokens, batch, device, dtype) for dtype in dtypes]
    return found


def measure(case: Case, repeats: int) -> dict[str, Any]:
    steps = build_steps(case)
    timings = time_steps(steps, repeats, case.device)
    seconds = {name: timing.median for name, timing in timings.items()}
    bound = seconds["teacher"] + seconds["plain"]
    peaks = {name: peak_bytes(step, case.device) for name, step in steps.items()}
    methods = [*OURS, *DENSE]
    return {
        "model": case.model,
        "tokens": case.tokens,
        "batch": case.batch,
        "dtype": str(case.dtype)[6:],
        "seconds": seconds,
        "bound_seconds": bound,
        "ratio": {name: seconds[name] / bound for name in methods},
        "floor": {name: floor(case.model, case.tokens, name) for name in OURS},
        "extra_mebibytes_an_image": {
            name: (peaks[name] - peaks["plain"]) / case.batch / 2**20 for name in methods
        },
    }


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return how the memory over a plain step grows with N from 577 to 2,305 tokens: the slope of log over log."""
    found = {}
    for model in {row["model"] for row in rows}:
        ends = [row for n in (577, 2305) for row in rows if (row["model"], row["tokens"]) == (model, n)]
        for name in [*OURS, *DENSE] if len(ends) == 2 else []:
            small, large = (row["extra_mebibytes_an_image"][name] for row in ends)
            if small > 0 and large > 0:
                found[f"{model}, {name}"] = math.log(large / small) / math.log(2305 / 577)
    return found


def table(result: dict[str, Any]) -> str:
    """Return the table of times, that of memory, and how memory grows."""
    methods = [*OURS, *DENSE]
    case: Columns = {"model": itemgetter("model"), "tokens": lambda row: f"{row['tokens']:,}"}
    times: Columns = {
        **case,
        "batch": itemgetter("batch"),
        "dtype": itemgetter("dtype"),
        "bound (s)": lambda row: f"{row['bound_seconds']:.2f}",
        **{f"{name} (floor)" if name in OURS else name: partial(over_bound, name) for name in methods},
    }
    memory: Columns = {name: partial(_extra_memory, name) for name in methods}
    growth = [
        f"Growth with N from 577 to 2,305, {name}: N^{value:.2f}"
        for name, value in result["exponents"].items()
    ]
    parts = [
        f"Step time over the bound (teacher forward + plain student step). {result['machine']}.",
        tabulate(result["rows"], times, ["dtype"]).to_markdown(),
        "Peak memory over a plain student step, MiB an image.",
        tabulate(result["rows"], {**case, **memory}).to_markdown(),
        "\n".join(growth),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def over_bound(name: str, row: dict[str, Any]) -> str:
    """Return the time of a method over the bound, and in parentheses its least, as far as it is known."""
    return format_ratio(row["ratio"][name], row["floor"].get(name))


def _extra_memory(name: str, row: dict[str, Any]) -> str:
    return f"{row['extra_mebibytes_an_image'][name]:.0f}"


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{device}, {platform.machine()}, torch {torch.__version__.split('+')[0]}"


if __name__ == "__main__":
    main()
