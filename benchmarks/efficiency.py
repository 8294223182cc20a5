"""Write the measured tables into docs/efficiency.md: `python -m benchmarks.efficiency`, after the commands there."""

from __future__ import annotations

from pathlib import Path

from graftvit.models.layer_plan import FASTER_FROM
from graftvit.transfer.analysis.benchmark import crossover_table, size_table
from graftvit.transfer.analysis.benchmark_cases import Results, read_results
from graftvit.transfer.analysis.report.tables import Table

from . import peers
from .marked import put_between_marks

PAGE = Path(__file__).parent.parent / "docs" / "efficiency.md"
RESULTS = Path(__file__).parent / "results"
TOKENS = 4096


def main() -> None:
    operators = read_results(RESULTS / "operators" / "results.json")
    models = read_results(RESULTS / "models" / "results.json")
    tables = {
        "peers": "\n\n".join(peers.tables(peers.read(peers.RESULTS))),
        "machine": f"{operators.machine}. {loads(operators)}",
        "operators": size_table(
            [row for row in operators.rows if (row.case.size, row.case.batch) == (TOKENS, 1)]
        ).to_markdown(),
        "crossover": crossover_table(operators).to_markdown(),
        "claims": claims(operators),
        "models": "\n\n".join(model_tables(models)),
    }
    for name, text in tables.items():
        put_between_marks(PAGE, name, text)
    print(f"{PAGE} has {len(operators.rows)} operator and {len(models.rows)} model cases")


def loads(results: Results) -> str:
    """Return what else the machine did meanwhile."""
    low, high = min(row.load for row in results.rows), max(row.load for row in results.rows)
    return f"Load average while measuring {low:.1f} to {high:.1f}, this benchmark included."


def claims(results: Results) -> str:
    """From how many tokens on each operator claims to be faster."""
    names = dict.fromkeys(row.case.name for row in results.rows)
    cells = [[f"`{name}`", f"{FASTER_FROM[name]:,}" if name in FASTER_FROM else "none"] for name in names]
    return Table(["operator", "claims to be faster from N"], cells).to_markdown().replace("\\`", "`")


def model_tables(results: Results) -> list[str]:
    """Return a heading and a table for each image side and batch."""
    parts = []
    for size, batch in dict.fromkeys((row.case.size, row.case.batch) for row in results.rows):
        rows = [row for row in results.rows if (row.case.size, row.case.batch) == (size, batch)]
        parts += [f"{rows[0].case.source}, {size} px, batch {batch}:", size_table(rows).to_markdown()]
    return parts


if __name__ == "__main__":
    main()
