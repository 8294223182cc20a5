"""`graftvit demo`: train teachers and students on digits, on a CPU, without a download."""

from __future__ import annotations

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
    parser.switch("--quick", "one seed instead of five, and shorter training of the teachers")
    parser.output_dir("the report's folder", "demo")
    text = "seeds of the students (default: 0 1 2 3 4)"
    parser.flag("--seeds", text, type=int, nargs="+", metavar="SEED")
    text = "cells at the same time (default: one per core); no effect on numbers"
    parser.flag("--processes", text, type=int, metavar="N")
    parser.flag("--threads", "threads of a cell; changes the rounding", type=int, default=1, metavar="N")
    arguments = parser.parse_args(argv)
    from ...transfer.analysis.demo import run_demo

    report = run_demo(
        arguments.output_dir,
        arguments.quick,
        seeds=arguments.seeds,
        processes=arguments.processes,
        threads=arguments.threads,
    )
    say(f"report: {report}\n")
    return 0
