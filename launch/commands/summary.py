"""`graftvit summary FOLDER`: summarize the results of a sweep as tables and a plot."""

from __future__ import annotations

from ..flags import command_parser, run_folder
from ..say import say, say_aside

EXAMPLES = (
    "graftvit summary runs/layers",
    "graftvit summary runs/layers > table.md",
)
DESCRIPTION = (
    "Print the results of the finished cells of a sweep: one row for each setting, mean ± standard deviation over "
    "seeds, and the cells that failed or are not finished. Accuracies are in percent, after the last epoch and at the "
    "best one. The tables and a plot are written to FOLDER as summary.csv, summary.md and summary.png."
)


def run(argv: list[str]) -> int:
    """Print the table as Markdown and write the three files."""
    parser = command_parser("summary", DESCRIPTION, EXAMPLES, usage="FOLDER")
    parser.add_argument("folder", type=run_folder, metavar="FOLDER", help="the output_dir of the sweep")
    arguments = parser.parse_args(argv)
    from ..slurm.summary import summarize, to_markdown, write_summary

    summary = summarize(arguments.folder)
    say(to_markdown(summary))
    for path in write_summary(summary):
        say_aside(f"{path}\n")
    return 0
