"""`graftvit logs`: print the logs of a run's processes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.errors import ConfigError
from ..flags import command_parser, run_folder
from ..say import hint, say, say_aside

if TYPE_CHECKING:
    from ..slurm.job_folder import JobFolder, Submission
    from ..slurm.logs import Follower

EXAMPLES = (
    "graftvit logs /scratch/me/distill",
    "graftvit logs /scratch/me/distill --follow",
    "graftvit logs /scratch/me/distill --rank 3 --lines 200",
    "graftvit logs /scratch/me/distill --rank all    # all ranks, merged by time",
)


def run(argv: list[str]) -> int:
    """Print the end of the logs of the job that `graftvit jobs` shows; with --follow also new lines."""
    from ..slurm.job_folder import JobFolder
    from ..slurm.jobs import run_folders, shown_submission

    arguments = _parse(argv)
    folders = run_folders(arguments.run)
    folder = arguments.run.absolute()
    if folders != [folder]:
        raise ConfigError(f"{folder} has several runs: choose one, as in `{hint('logs', folders[0])}`")
    submission = shown_submission(folder)
    _check_rank(folder, submission, arguments)
    paths = _paths(JobFolder(folder), submission, arguments.rank)
    followers: dict[Path, Follower] = {}
    shown = (_show_merged if arguments.rank is None else _show_end)(paths(), arguments.lines, followers)
    if arguments.follow:
        _follow(folder, paths, followers, arguments.rank, shown)
    elif shown is None:
        say_aside(f"graftvit: there is no log yet: `{hint('jobs', folder)}` shows the state of the run\n")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "logs",
        "Print the standard error and standard output of one process of a run. With `--rank all`, print the lines of "
        "all processes, merged by the times in lines of torch, submitit and Slurm; a line without a time stays after "
        "the line before it.",
        EXAMPLES,
        usage="RUN [--rank K|all] [--lines N] [--follow]",
    )
    parser.add_argument(
        "run", type=run_folder, metavar="RUN", help="folder of a run, or of a cell of a sweep"
    )
    parser.add_argument(
        "--rank", default="0", metavar="K", help="process, or all (default: 0, the first one)"
    )
    parser.add_argument("--lines", type=int, default=50, help="last lines of each file (default: 50)")
    parser.add_argument(
        "--follow", "-f", action="store_true", help="print new lines until the run has ended, or Ctrl-C"
    )
    arguments = parser.parse_args(argv)
    if arguments.lines < 0:
        raise ConfigError(f"--lines {arguments.lines} is negative: give 0 or more")
    if arguments.rank != "all" and not arguments.rank.isdecimal():
        raise ConfigError(f"--rank {arguments.rank}: give all, or the number of a process, 0 or more")
    arguments.rank = None if arguments.rank == "all" else int(arguments.rank)
    return arguments


def _check_rank(folder: Path, submission: Submission | None, arguments: argparse.Namespace) -> None:
    from ..slurm.logs import ranks_with_logs

    there = [] if submission is None else ranks_with_logs(submission)
    if there and arguments.rank not in (None, *there) and not arguments.follow:
        raise ConfigError(
            f"--rank {arguments.rank} has no log in {folder}: ranks with logs are {_ranges(there)}"
        )


def _paths(
    files: JobFolder, submission: Submission | None, rank: int | None
) -> Callable[[], tuple[Path, ...]]:
    """Return a function that finds the logs of a job, or of a newer job after the run is submitted again."""
    from ..slurm.logs import all_files, log_files

    first = files.submission()

    def paths() -> tuple[Path, ...]:
        newest = files.submission()
        shown = submission if newest == first else newest
        if shown is None:
            return ()
        return all_files(shown) if rank is None else log_files(shown, rank)

    return paths


def _show_end(paths: tuple[Path, ...], lines: int, followers: dict[Path, Follower]) -> Path | None:
    """Print the end of each file, and return the last file printed."""
    from ..slurm.logs import Follower, tail

    shown = None
    for path in paths:
        followers[path] = Follower.at_end(path)
        text = tail(path, lines)
        if text:
            shown = _write(path, text, shown)
    return shown


def _show_merged(paths: tuple[Path, ...], lines: int, followers: dict[Path, Follower]) -> Path | None:
    from ..slurm.logs import Follower, merged

    followers.update({path: Follower.at_end(path) for path in paths})
    found = merged(paths, lines)
    say("".join(f"{_plain(line)}\n" for line in found))
    sys.stdout.flush()
    return paths[0] if found else None


def _follow(
    folder: Path,
    paths: Callable[[], tuple[Path, ...]],
    followers: dict[Path, Follower],
    rank: int | None,
    shown: Path | None,
) -> None:
    from ..slurm.jobs import describe_run
    from ..slurm.logs import follow, with_rank

    for path, text in follow(paths, lambda: describe_run(folder).over, followers):
        if rank is None:
            say(with_rank(path, _plain(text), followers))
            sys.stdout.flush()
        else:
            shown = _write(path, text, shown)
    status = describe_run(folder)
    say_aside(f"graftvit: the run is {status.state}{f': {status.why}' if status.why else ''}\n")


def _write(path: Path, text: str, shown: Path | None) -> Path:
    """Print `text`, after the name of its file if the previous text came from another file."""
    if path != shown:
        say(f"==> {path} <==\n")
    lines = _plain(text)
    say(lines if lines.endswith("\n") else f"{lines}\n")
    sys.stdout.flush()
    return path


def _plain(text: str) -> str:
    """Return progress bars that overwrite their line as separate lines."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _ranges(ranks: list[int]) -> str:
    return f"0 to {ranks[-1]}" if ranks == list(range(len(ranks))) else ", ".join(map(str, ranks))
