"""`graftvit demo`: the whole story on digits, on a CPU, without a download."""

from __future__ import annotations

from pathlib import Path

from ...models.errors import ConfigError
from ..flags import command_parser
from ..say import say


def run(argv: list[str]) -> int:
    """Run the demo and print where its report is."""
    parser = command_parser(
        "demo",
        "Train two small teachers on scikit-learn's digits, one with all labels and one without any, then students "
        "with few labels: from scratch, fine-tuned, with copied and with distilled attention. Writes a report. "
        "Finished cells stay: the same command goes on where it was stopped.",
        ["graftvit demo --quick", "graftvit demo --output_dir /tmp/demo --processes 2"],
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed instead of five, and shorter training of the teachers"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("demo"), help="the report's folder (default: demo)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="of the students (default: 0 1 2 3 4)"
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="cells at a time (default: one a core); the numbers stay"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", default=1, help="threads of a cell; rounds otherwise (default: 1)"
    )
    arguments = parser.parse_args(argv)
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        raise ConfigError(f"--output_dir is {str(arguments.output_dir)!r}, which is a file; name a folder")
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
