"""Time operators beside other forms of the same equations: `python -m benchmarks.peers`, with the extra `peers`.

Each operator takes turns with its straight-line form and its public implementation (`forms.py`). What was measured goes
to results/peers.json, and `python -m benchmarks.efficiency` puts it into docs/efficiency.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from graftvit.models.layer_plan import OPERATORS, create_operator
from graftvit.transfer.analysis.benchmark import Layer, choice_of, draw_heads, operator_step
from graftvit.transfer.analysis.benchmark_cases import SOFTMAX, Step, keep_freed_memory, machine, time_steps
from graftvit.transfer.analysis.report.tables import Table, milliseconds

from .forms import public_form, straight_form

RESULTS = Path(__file__).parent / "results" / "peers.json"


@dataclass(frozen=True)
class Peers:
    """Median seconds of an operator and of its other forms, timed in the same rounds."""

    operator: str
    tokens: int
    backward: bool
    own: float
    straight: float | None
    """None for an operator that is written so itself."""
    public: float | None
    """None where no public implementation is known."""
    package: str


def main() -> None:
    arguments = parse()
    keep_freed_memory()
    rows: list[Peers] = []
    for tokens in arguments.tokens:
        for backward in (False, True):
            for name in arguments.operators:
                rows.append(measure(name, tokens, backward, Layer(), arguments.repeats))
                print(rows[-1], flush=True)
                content = {"machine": machine(), "rows": [asdict(row) for row in rows]}
                arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    print("\n\n".join(tables(rows)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    own = [name for name in OPERATORS if name != SOFTMAX]
    parser.add_argument("--operators", nargs="+", default=own, metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=int, default=[196, 1024, 4096], metavar="N")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def measure(name: str, tokens: int, backward: bool, layer: Layer, repeats: int) -> Peers:
    """Time one operator on random projections of one image. Raises ConfigError: a package is not installed."""
    torch.manual_seed(0)
    operator = create_operator(choice_of(name), layer.shape(tokens)).eval()
    operator.fit([], seed=0)
    heads = draw_heads(operator.shape, 1, torch.device("cpu"), torch.float32)
    straight, public = straight_form(operator), public_form(name, operator, heads)
    steps: dict[str, Step] = {"own": operator_step(operator, heads, backward, operator.parameters())}
    if straight is not None:
        steps["straight"] = operator_step(straight, heads, backward, operator.parameters())
    if public is not None:
        _, call, parameters = public
        steps["public"] = operator_step(lambda heads: call(*heads.qkv()), heads, backward, parameters)
    found = {key: timing.median for key, timing in time_steps(steps, repeats, torch.device("cpu")).items()}
    package = "" if public is None else public[0]
    return Peers(name, tokens, backward, found["own"], found.get("straight"), found.get("public"), package)


def tables(rows: Sequence[Peers]) -> list[str]:
    """Return a heading and a table for each number of tokens, forward, and forward and backward."""
    parts = []
    for tokens, backward in dict.fromkeys((row.tokens, row.backward) for row in rows):
        parts.append(f"{tokens:,} tokens, {'forward and backward' if backward else 'forward'}.")
        parts.append(table([row for row in rows if (row.tokens, row.backward) == (tokens, backward)]))
    return parts


def table(rows: Sequence[Peers]) -> str:
    """Return a line an operator: its time over those of its straight-line form and of a public package."""
    head = ["operator", "ms", "straight-line ms", "ratio", "public implementation", "its ms", "ratio"]
    lines = []
    for row in sorted(rows, key=lambda row: row.operator):
        straight, public = (
            ("", "") if seconds is None else (milliseconds(seconds), f"{row.own / seconds:.2f}")
            for seconds in (row.straight, row.public)
        )
        lines.append([row.operator, milliseconds(row.own), *straight, row.package, *public])
    return (
        "Time over the time of other forms; below 1 the operator is faster:\n\n"
        + Table(head, lines).to_markdown()
    )


def read(path: Path) -> list[Peers]:
    """Return the rows of a file."""
    return [Peers(**row) for row in json.loads(path.read_text())["rows"]]


if __name__ == "__main__":
    main()
