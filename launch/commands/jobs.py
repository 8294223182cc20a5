"""`graftvit jobs`: how the runs on a cluster are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.errors import ConfigError, GraftError
from ..flags import command_parser, run_folder
from ..say import say, say_aside

if TYPE_CHECKING:
    from ..slurm.jobs import RunStatus

EXAMPLES = (
    "graftvit jobs                         # all runs that this user submitted from here",
    "graftvit jobs /scratch/me/distill     # one at length: restarts and why, the error of the rank that failed",
    "graftvit jobs /scratch/me/sweep       # a line a cell",
    "graftvit jobs --active --watch        # what waits or runs, again and again until nothing does",
    "graftvit jobs --last 5                # the five runs that were submitted last",
    "graftvit jobs --json | jq '.[].state'",
)


def run(argv: list[str]) -> int:
    """Print a table, one run at length, or JSON."""
    from ..slurm.jobs_text import describe, problems, to_json, watch, write_table

    arguments = _parse(argv)
    if arguments.watch:
        try:
            watch(lambda: _look(arguments, tries=1), sys.stdout, _none(arguments))
        except KeyboardInterrupt:  # the way to leave it, and no failure
            say("\n")
        return 0
    status, names = _look(arguments)
    if arguments.json:
        say(to_json(status))
    elif not status:
        say(_none(arguments))
    elif len(status) == 1 and arguments.runs:
        say(describe(status[0]))
    else:
        write_table(status, names, sys.stdout)
    say_aside("".join(f"graftvit: {problem}" for problem in problems(status)))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "jobs",
        "Show runs on a cluster: state, restarts and why, nodes, progress, the time left, and of a waiting run why it "
        "waits and when it is expected to start. Read from the files of each run, and checked against the scheduler "
        "where it can be asked.",
        EXAMPLES,
        usage="[RUN ...] [--active] [--last N] [--watch | --json]",
    )
    parser.add_argument(
        "runs", type=run_folder, nargs="*", metavar="RUN", help="folder of a run or of a sweep"
    )
    parser.add_argument("--active", action="store_true", help="those alone that wait or run")
    parser.add_argument(
        "--last", type=int, metavar="N", help="those alone that were submitted last, N of them"
    )
    parser.add_argument(
        "--watch", action="store_true",
        help="draw the table anew until no run is active, or Ctrl-C; in a pipe, write it where a state has changed",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="all that is known, for scripts")
    arguments = parser.parse_args(argv)
    if arguments.last is not None and arguments.last < 1:
        raise ConfigError(f"--last {arguments.last}: give 1 or more")
    if arguments.watch and arguments.json:
        raise ConfigError("--watch draws a table, and --json is for scripts: give one of them")
    return arguments


def _look(arguments: argparse.Namespace, **asking: int) -> tuple[Sequence[RunStatus], Sequence[str]]:
    """The runs as they are now, and their names."""
    from ..slurm.jobs import describe_runs

    names = _folders(arguments.runs)
    found = list(zip(describe_runs(names, **asking), names.values(), strict=True))
    if arguments.active:
        found = [(run, name) for run, name in found if run.active]
    if arguments.last is not None:
        found = sorted(found, key=lambda entry: entry[0].submitted)[-arguments.last :]
    return [run for run, _ in found], [name for _, name in found]


def _folders(given: Sequence[Path]) -> dict[Path, str]:
    """Run folder -> its name: a path that every command takes from here."""
    from ..slurm.jobs import listed_runs, run_folders

    names = {}
    for folder in given or listed_runs():
        try:
            runs = run_folders(folder)
        except GraftError:
            if given:
                raise
            continue  # a remembered folder that is something else by now
        names.update({run: str(folder / run.relative_to(folder.absolute())) for run in runs})
    return names


def _none(arguments: argparse.Namespace) -> str:
    if arguments.active:
        return "no run waits or runs\n"
    return (
        "no run of this user is listed: `graftvit jobs FOLDER` shows one by its folder, `graftvit submit --help` tells "
        "how to submit\n"
    )
