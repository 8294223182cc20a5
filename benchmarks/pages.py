"""Write the measured step times into README.md and docs/transfer.md: `python -m benchmarks.pages`, after the benchmark.

Only what is between the marks of each page changes.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

from graftvit.transfer.analysis.report.tables import tabulate

from .__main__ import RESULTS, Columns, over_bound
from .marked import put_between_marks

ROOT = Path(__file__).parent.parent
MODEL, TOKENS = "ViT-S", (1025, 2305)
"""The model of the pages, and the numbers of tokens that their sentences name."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.pages", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument(
        "--kept", type=Path, default=RESULTS / "cpu_kept.json", help="results with --keep_freed_memory"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of README.md and docs")
    arguments = parser.parse_args()
    result, kept = (json.loads(path.read_text()) for path in (arguments.results, arguments.kept))
    for name, text in (("README.md", summary(result, kept)), ("docs/transfer.md", section(result, kept))):
        put_between_marks(arguments.root / name, "cpu", text)
        print(f"{arguments.root / name} has the numbers")


def summary(result: dict[str, Any], kept: dict[str, Any]) -> str:
    """Return the paragraph of the README."""
    small, large = (row_of(result, tokens) for tokens in TOKENS)
    ratio, other = small["ratio"], large["ratio"]
    memory = large["extra_mebibytes_an_image"]
    faster = any(row["ratio"]["dense distill"] < row["ratio"]["distill"] for row in kept["rows"])
    turned = (
        "With few tokens, forming them can be faster where the C library keeps freed memory. "
        if faster
        else ""
    )
    return textwrap.fill(
        f"A distillation step with all layers of {MODEL} costs {ratio['distill']:.2f} × the bound (teacher forward "
        f"plus a plain student step) at 1,025 tokens and {other['distill']:.2f} × at 2,305; forming the maps costs "
        f"{ratio['dense distill']:.2f} × and {other['dense distill']:.2f} ×, and {memory['dense distill']:,.0f} MiB an "
        f"image instead of {memory['distill']:.0f}. {turned}"
        f"Copying costs {ratio['copy']:.2f} × and {other['copy']:.2f} × the "
        "bound, because the student computes no queries and keys ([measured](docs/transfer.md#no-map-is-formed) in "
        f"float32 on {result['machine']} by `make bench`).",
        120,
        break_on_hyphens=False,
    )


def section(result: dict[str, Any], kept: dict[str, Any]) -> str:
    """Return the table of docs/transfer.md, and the paragraphs around it."""
    small, large = (row_of(result, tokens)["extra_mebibytes_an_image"] for tokens in TOKENS)
    power = {name: result["exponents"][f"{MODEL}, {name}"] for name in ("distill", "dense distill")}
    before = (
        f"Measured in float32 on {result['machine']}, all layers of {MODEL}, medians of {result['repeats']} rounds "
        "(`make bench`, [benchmarks/results/cpu.md](../benchmarks/results/cpu.md)): the time relative to the bound, "
        "and in parentheses the minimum by the operations of the products (other operations are in the bound, too, so "
        "a measured ratio can be lower)."
    )
    after = (
        f"Compared with a plain student step, an image needs {small['distill']:.0f} MiB more at 1,025 tokens and "
        f"{large['distill']:.0f} at 2,305 (growing as N to the power {power['distill']:.2f}); in the dense form "
        f"{small['dense distill']:,.0f} and {large['dense distill']:,.0f} ({power['dense distill']:.2f})."
    )
    paragraphs = [
        textwrap.fill(text, 120, break_on_hyphens=False) for text in (before, after, with_kept_memory(kept))
    ]
    paragraphs.insert(1, table(result))
    return "\n\n".join(paragraphs)


def with_kept_memory(kept: dict[str, Any]) -> str:
    """Return the paragraph about freed memory that stays in the process."""
    rows = [row for row in kept["rows"] if row["model"] == MODEL]
    tokens = [f"{row['tokens']:,}" for row in rows]
    ours, dense = (
        listed([f"{row['ratio'][name]:.2f}" for row in rows]) for name in ("distill", "dense distill")
    )
    return (
        "Part of the dense form's time is the system's, which hands out the pages of its maps again in each step. "
        "Where the C library keeps freed memory "
        f"(`make bench ARGS='--keep_freed_memory --tokens {' '.join(tokens)}'`, the same machine), distilling costs "
        f"{ours} × the bound at {listed(tokens)} tokens, and the dense form {dense} ×."
    )


def listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def table(result: dict[str, Any]) -> str:
    """Return a line for each number of tokens."""
    columns: Columns = {
        "tokens": lambda row: f"{row['tokens']:,}",
        **{name: partial(over_bound, name) for name in result["rows"][0]["ratio"]},
    }
    return tabulate([row for row in result["rows"] if row["model"] == MODEL], columns).to_markdown()


def row_of(result: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return the numbers of `MODEL` with so many tokens."""
    rows: list[dict[str, Any]] = result["rows"]
    return next(row for row in rows if (row["model"], row["tokens"]) == (MODEL, tokens))


if __name__ == "__main__":
    main()
