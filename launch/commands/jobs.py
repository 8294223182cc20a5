"""`graftvit jobs`: how the runs on a cluster are."""

from __future__ import annotations

import sys
from pathlib import Path

from ...models.errors import GraftError
from ..flags import command_parser
from ..say import say

EXAMPLES = (
    "graftvit jobs                         # all runs that this user submitted from here",
    "graftvit jobs /scratch/me/distill     # one at length: restarts and why, the error of the rank that failed",
    "graftvit jobs /scratch/me/sweep       # a line a cell",
    "graftvit jobs --json | jq '.[].state'",
)


def run(argv: list[str]) -> int:
    """Print a table, one run at length, or JSON."""
    from ..slurm.jobs import describe_runs, run_folders
    from ..slurm.jobs_text import describe, to_json, write_table
    from ..slurm.registry import known

    parser = command_parser(
        "jobs",
        "Show runs on a cluster: state, restarts and why, nodes, progress and the time left. Read from the files of "
        "each run, and checked against the scheduler where it can be asked.",
        EXAMPLES,
        usage="[RUN ...] [--json]",
    )
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folder of a run or of a sweep")
    parser.add_argument("--json", action="store_true", help="all that is known, for scripts")
    arguments = parser.parse_args(argv)
    folders, names = [], []
    for given in arguments.runs or known():
        try:
            found = run_folders(given)
        except GraftError:
            if arguments.runs:
                raise
            continue  # a remembered folder that is something else by now
        folders += found
        names += [str(given) if path == given.absolute() else f"{given.name}/{path.name}" for path in found]
    status = describe_runs(folders)
    if arguments.json:
        say(to_json(status))
    elif not status:
        say("no run was submitted by this user; `graftvit submit --help` tells how\n")
    elif len(status) == 1 and arguments.runs:
        say(describe(status[0]))
    else:
        write_table(status, names, sys.stdout)
    return 0
