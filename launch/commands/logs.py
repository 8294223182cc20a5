"""`graftvit logs`: what the processes of a run wrote."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...models.errors import ConfigError
from ..flags import command_parser
from ..say import say, say_aside

EXAMPLES = (
    "graftvit logs /scratch/me/distill",
    "graftvit logs /scratch/me/distill --follow",
    "graftvit logs /scratch/me/distill --rank 3 --lines 200",
)


def run(argv: list[str]) -> int:
    """Print the end of the logs of the newest job, and what is added if asked to."""
    from ..slurm.files import JobFolder
    from ..slurm.jobs import describe_run, run_folders
    from ..slurm.logs import Follower, follow, log_files, ranks_with_logs, tail

    arguments = _parse(argv)
    folders = run_folders(arguments.run)
    folder = arguments.run.absolute()
    if folders != [folder]:
        raise ConfigError(f"{folder} has several runs: name one, as in {folders[0]}")
    files, rank = JobFolder(folder), arguments.rank
    followers: dict[Path, Follower] = {}

    def paths() -> tuple[Path, ...]:
        submission = files.submission()
        return () if submission is None else log_files(submission, rank)

    submission = files.submission()
    there = [] if submission is None else ranks_with_logs(submission)
    if there and rank not in there and not arguments.follow:
        raise ConfigError(f"--rank {rank} has no log in {folder}: there are {_ranges(there)}")
    shown = None
    for path in paths():
        followers[path] = Follower.at_end(path)
        text = tail(path, arguments.lines)
        if text:
            shown = _write(path, text, shown)
    if not arguments.follow:
        if shown is None:
            say_aside(f"graftvit: nothing is written yet: `graftvit jobs {folder}` tells how it is\n")
        return 0
    for path, text in follow(paths, lambda: not describe_run(folder).active, followers):
        shown = _write(path, text, shown)
    status = describe_run(folder)
    say_aside(f"graftvit: the run is {status.state}{f': {status.why}' if status.why else ''}\n")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "logs",
        "Print what a process of a run wrote, standard error and standard output, of the newest job.",
        EXAMPLES,
        usage="RUN [--rank K] [--lines N] [--follow]",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of a cell of a sweep")
    parser.add_argument("--rank", type=int, default=0, help="process, the first one by default")
    parser.add_argument("--lines", type=int, default=50, help="last lines of each file (default: 50)")
    parser.add_argument(
        "--follow", "-f", action="store_true", help="go on until the run has ended, or Ctrl-C"
    )
    arguments = parser.parse_args(argv)
    for name in ("rank", "lines"):
        if getattr(arguments, name) < 0:
            raise ConfigError(f"--{name} {getattr(arguments, name)} is negative: give 0 or more")
    return arguments


def _write(path: Path, text: str, shown: Path | None) -> Path:
    """Prints, under the name of the file where it is another than before."""
    if path != shown:
        say(f"==> {path} <==\n")
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    say(lines if lines.endswith("\n") else f"{lines}\n")
    sys.stdout.flush()
    return path


def _ranges(ranks: list[int]) -> str:
    return f"0 to {ranks[-1]}" if ranks == list(range(len(ranks))) else ", ".join(map(str, ranks))
