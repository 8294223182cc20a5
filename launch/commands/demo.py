"""`graftvit demo`: train teachers and students on digits, on a CPU, without a download."""

from __future__ import annotations

from pathlib import Path

from ...models.errors import ConfigError
from ..flags import command_parser
from ..say import say


def run(argv: list[str]) -> int:
    """Run the demo and print the path of its report."""
    parser = command_parser(
        "demo",
        "Train two small teachers on scikit-learn's digits, one with all labels and one without any, then students "
        "with few labels: from scratch, fine-tuned, with copied and with distilled attention. Write a report. "
        "Finished cells are kept: repeat the command to continue a stopped demo.",
        ["graftvit demo --quick", "graftvit demo --output_dir /tmp/demo --processes 2"],
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed instead of five, and shorter training of the teachers"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("demo"), help="the report's folder (default: demo)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="seeds of the students (default: 0 1 2 3 4)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="cells at the same time (default: one per core); no effect on numbers",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        default=1,
        help="threads of a cell; changes the rounding (default: 1)",
    )
    arguments = parser.parse_args(argv)
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        raise ConfigError(f"--output_dir is {str(arguments.output_dir)!r}, which is a file; give a folder")
    from ...transfer.analysis.demo.demo import run_demo

    report = run_demo(
        arguments.output_dir,
        arguments.quick,
        seeds=arguments.seeds,
        processes=arguments.processes,
        threads=arguments.threads,
    )
    say(f"report: {report}\n")
    return 0
