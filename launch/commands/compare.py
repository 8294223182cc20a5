"""`graftvit compare`: compare many attention operators on one teacher and one budget."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ...models.errors import ConfigError
from ..flags import command_parser, parse_command
from ..say import hint, say, tell

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ...transfer.analysis.compare.comparison_cells import Cell, Comparison
    from ..load_config import Setting

EXAMPLES = (
    "graftvit compare digits_compare",
    "graftvit compare digits_compare --only teacher,uniform,linear --output_dir runs/few",
    "graftvit compare efficient_attention_cifar10 --data_path /data/cifar --download --dry_run",
    "graftvit submit mine.yaml --output_dir runs/mine",
    "graftvit compare runs/mine/jobs/config.yaml --report    # when these jobs have ended",
)
DESCRIPTION = (
    "Convert one teacher by each plan of the section 'compare', train every student through the same stages, and "
    "measure accuracy, parameters, multiply-adds, latency, throughput and memory. Each finished cell is saved; repeat "
    "the command to continue a stopped comparison. On a cluster, `graftvit submit` makes each cell a job; afterwards "
    "--report makes the tables of all cells. If cells ran at the same time or on a busy machine, time them again "
    "together with --speed."
)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[Setting]]:
    """Return the flags of the command, and the settings given beside them."""
    parser = command_parser("compare", DESCRIPTION, EXAMPLES, usage="CONFIG [--flag value ...]")
    parser.add_argument("config", metavar="CONFIG", help="recipe or YAML file with a section 'compare'")
    text = "run only the cells with these names, separated by commas"
    parser.flag("--only", text, action="append", metavar="NAMES")
    text = "run only this cell and write no report; used by jobs of `graftvit submit`"
    parser.flag("--cell", text, metavar="NAME")
    parser.switch("--dry_run", "list the cells and stop")
    parser.switch("--report", "make the tables and plots of the finished cells, and stop")
    text = "time all finished cells again in the same rounds, and make the report"
    parser.flag("--speed", text, type=int, metavar="ROUNDS")
    return parse_command(parser, argv)


def choose_cells(arguments: argparse.Namespace, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that --cell or --only names; all without. Raises ConfigError: one is not there."""
    from ...transfer.analysis.compare.comparison_cells import only_named

    if arguments.cell is not None:
        return only_named(cells, [arguments.cell], "--cell")
    return only_named(
        cells, arguments.only and [name for words in arguments.only for name in words.split(",")]
    )


def run(argv: list[str]) -> int:
    """Run the cells, or list them, or rebuild the report."""
    arguments, settings = parse(argv)
    if arguments.speed is not None and arguments.speed < 2:
        raise ConfigError(f"--speed {arguments.speed}: give at least two rounds")
    if arguments.cell is not None and arguments.only is not None:
        raise ConfigError(f"--cell {arguments.cell} and --only both choose cells: give one of the two")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes each start and stop to stderr
    from ...transfer.analysis.compare.compare import check_cells, raise_failed, run_compare
    from ...transfer.analysis.compare.comparison_report import write_report
    from ..load_config import load_comparison

    comparison = load_comparison(arguments.config, settings)
    cells = choose_cells(arguments, comparison.cells())
    if arguments.speed is not None:
        from ...transfer.analysis.compare.student_cell import measure_again

        measure_again(comparison, arguments.speed, tell)
    if arguments.report or arguments.speed is not None:
        say(f"report: {write_report(comparison)}\n")
        return 0
    check_cells(comparison, cells)
    if arguments.dry_run:
        say(_listing(comparison, cells))
        return 0
    alone = arguments.cell is not None
    if "SLURM_ARRAY_TASK_ID" in os.environ and not alone:
        raise ConfigError(
            "each job of a SLURM array would run the same cells: give each job its own --cell, or use graftvit submit"
        )

    def after_cell() -> None:
        if not alone:  # jobs of other cells would write the same files at the same time
            write_report(comparison, figures=False)

    failed = run_compare(comparison, cells, tell=tell, after_cell=after_cell)
    if alone:
        tell(f"when all jobs are done, `{hint('compare', arguments.config, '--report')}` makes the tables")
    else:
        say(f"report: {write_report(comparison)}\n")
    raise_failed(failed, comparison.folder)
    return 0


def _listing(comparison: Comparison, cells: list[Cell]) -> str:
    """Return one line for each cell: its folder, its state and its plan."""
    from ...transfer.analysis.report.tables import aligned

    table = aligned([[cell.folder, comparison.state(cell), cell.plan or "unchanged"] for cell in cells])
    stages = ", ".join(f"{stage.name} ({stage.config.mode})" for stage in comparison.stages)
    return f"{table}stages of each student: {stages}\nin {comparison.folder}\n"
