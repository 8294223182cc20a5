"""`graftvit jobs`: show the state of the runs on a cluster."""

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
    "graftvit jobs /scratch/me/distill     # one run in detail: restarts and reasons, the error of the failed rank",
    "graftvit jobs /scratch/me/sweep       # one line for each cell",
    "graftvit jobs --active --watch        # repeat the table of waiting and running runs until none is left",
    "graftvit jobs --last 5                # the five runs that were submitted last",
    "graftvit jobs --json | jq '.[].state'",
)


def run(argv: list[str]) -> int:
    """Print a table, one run in detail, or JSON."""
    from ..slurm.jobs_text import describe, problems, to_json, watch, write_table

    arguments = _parse(argv)
    if arguments.watch:
        try:
            watch(lambda: _look(arguments, tries=1), sys.stdout, _none(arguments))
        except KeyboardInterrupt:  # the normal way to end it
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
        "Show runs on a cluster: state, restarts and their reasons, nodes, progress and time left; for a waiting run "
        "why it waits and when it is expected to start. This is read from the files of each run, and checked with the "
        "scheduler if it answers.",
        EXAMPLES,
        usage="[RUN ...] [--active] [--last N] [--watch | --json]",
    )
    parser.add_argument(
        "runs", type=run_folder, nargs="*", metavar="RUN", help="folder of a run or of a sweep"
    )
    parser.add_argument("--active", action="store_true", help="only runs that wait or run")
    parser.add_argument("--last", type=int, metavar="N", help="only the N runs that were submitted last")
    parser.add_argument(
        "--watch", action="store_true",
        help="redraw the table until no run is active, or Ctrl-C; in a pipe, print it when a state has changed",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print all known facts as JSON, for scripts")
    arguments = parser.parse_args(argv)
    if arguments.last is not None and arguments.last < 1:
        raise ConfigError(f"--last {arguments.last}: give 1 or more")
    if arguments.watch and arguments.json:
        raise ConfigError("--watch and --json cannot be combined: give one of them")
    return arguments


def _look(arguments: argparse.Namespace, **asking: int) -> tuple[Sequence[RunStatus], Sequence[str]]:
    """Return the current status of the runs, and their names."""
    from ..slurm.jobs import describe_runs

    names = _folders(arguments.runs)
    found = list(zip(describe_runs(names, **asking), names.values(), strict=True))
    if arguments.active:
        found = [(run, name) for run, name in found if run.active]
    if arguments.last is not None:
        found = sorted(found, key=lambda entry: entry[0].submitted)[-arguments.last :]
    return [run for run, _ in found], [name for _, name in found]


def _folders(given: Sequence[Path]) -> dict[Path, str]:
    """Map each run folder to its name: a path that every command accepts in this folder."""
    from ..slurm.jobs import listed_runs, run_folders

    names = {}
    for folder in given or listed_runs():
        try:
            runs = run_folders(folder)
        except GraftError:
            if given:
                raise
            continue  # a listed folder that is no longer a run
        names.update({run: str(folder / run.relative_to(folder.absolute())) for run in runs})
    return names


def _none(arguments: argparse.Namespace) -> str:
    if arguments.active:
        return "no run waits or runs\n"
    return (
        "no run of this user is listed: `graftvit jobs FOLDER` shows a run by its folder, `graftvit submit --help` "
        "explains how to submit\n"
    )
