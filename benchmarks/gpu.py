"""Time and memory of the transfer step on a GPU, as a table in docs/transfer.md: `python -m benchmarks.gpu`.

The bound, our methods, and the dense form, which keeps every map; float32 is without autocast, bfloat16 with it. A step
that does not fit the memory is written as such.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import torch
from graftvit.transfer.analysis.benchmark_cases import Step, peak_bytes, time_steps
from graftvit.transfer.analysis.report.tables import Table

from .__main__ import machine
from .marked import put_between_marks
from .steps import MODELS, OURS, Case, build_steps, floor, format_ratio

PAGE = Path(__file__).parent.parent / "docs" / "transfer.md"
SHOWN = ("plain", "distill", "copy", "dense distill", "dense copy")
TOKENS = [197, 577, 1025, 2305, 4097]
TOKENS_A_STEP = 16_384
ROUNDS = 9
TOO_LARGE = "out of memory"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, choices=TOKENS, default=TOKENS)
    parser.add_argument("--minutes", type=float, default=6.0, help="start no case after this time")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    device, start = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.monotonic()
    rows = []
    for tokens in arguments.tokens:
        for model in arguments.models:
            for dtype in (torch.bfloat16, torch.float32):
                if time.monotonic() - start < 60 * arguments.minutes:
                    case = Case(model, tokens, max(1, TOKENS_A_STEP // tokens), device, dtype)
                    rows.append(row(case))
                    print(*rows[-1], sep=", ", flush=True)
    put_between_marks(arguments.page, "gpu", table(rows))
    print(f"{arguments.page} has the table")


def row(case: Case) -> list[str]:
    """Return one line of the table."""
    cells = [case.model, f"{case.tokens:,}", str(case.batch), str(case.dtype)[6:]]
    steps = build_steps(case)
    bound = sum(seconds(steps[name], case.device) for name in ("teacher", "plain"))
    cells.append(f"{1000 * bound:.1f}")
    for name in SHOWN:
        cells.append(cell(steps[name], name, case, bound))
        gc.collect()
        torch.cuda.empty_cache()
    return cells


def cell(step: Step, name: str, case: Case, bound: float) -> str:
    """Return the time over the bound, its least in parentheses, and the peak memory."""
    try:
        ratio, peak = seconds(step, case.device) / bound, peak_bytes(step, case.device)
    except torch.cuda.OutOfMemoryError:
        return TOO_LARGE
    least = floor(case.model, case.tokens, name) if name in OURS else None
    return f"{format_ratio(ratio, least)}, {peak / 2**30:.2f}"


def seconds(step: Step, device: torch.device) -> float:
    return time_steps({"step": step}, ROUNDS, device)["step"].median


def table(rows: list[list[str]]) -> str:
    """Return the table in Markdown."""
    head = ["model", "tokens", "batch", "type", "bound (ms)", *SHOWN]
    about = f"{machine()}. Time over the bound (its minimum), and peak memory in GiB."
    return f"{about}\n\n{Table(head, rows, ['type']).to_markdown()}"


if __name__ == "__main__":
    main()
