"""`graftvit jobs`: show the runs on a cluster; print their logs; stop, resume and forget them; summarize a sweep."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.errors import ConfigError, GraftError
from ..flags import Action, command_parser, describe_actions, run_folder, whole
from ..say import hint, say, say_aside

if TYPE_CHECKING:
    from ..slurm.job_folder import JobFolder, Submission
    from ..slurm.jobs import RunStatus
    from ..slurm.logs import Follower

EXAMPLES = (
    "graftvit jobs                         # all runs that this user submitted from here",
    "graftvit jobs /scratch/me/distill     # one run in detail: restarts and reasons, the error of the failed rank",
    "graftvit jobs /scratch/me/sweep       # one line for each cell",
    "graftvit jobs --active --watch        # repeat the table of waiting and running runs until none is left",
    "graftvit jobs --last 5                # the five runs that were submitted last",
    "graftvit jobs --json | jq '.[].state'",
    "graftvit jobs logs /scratch/me/distill --follow",
    "graftvit jobs logs /scratch/me/distill --rank 3 --lines 200",
    "graftvit jobs logs /scratch/me/distill --rank all    # all ranks, merged by time",
    "graftvit jobs stop /scratch/me/distill          # save after the next step, then end; not requeued",
    "graftvit jobs stop /scratch/me/distill --now    # end at once; the last saved state remains",
    "graftvit jobs stop /scratch/me/sweep            # stop all cells that wait or run",
    "graftvit jobs stop /scratch/me/a /scratch/me/b  # stop several runs",
    "graftvit jobs resume /scratch/me/distill",
    "graftvit jobs resume /scratch/me/distill --nodes 4 --time 1-00:00:00    # on fewer nodes, the same global batch",
    "graftvit jobs resume /scratch/me/distill --nodes 2 --dry_run            # how the batch would be shared",
    "graftvit jobs resume /scratch/me/sweep                                  # the cells that failed or were stopped",
    "graftvit jobs forget /scratch/me/distill     # `graftvit jobs` no longer lists it",
    "graftvit jobs forget --ended                 # all runs whose jobs have ended",
    "graftvit jobs summary runs/layers > table.md",
)
RUNS_HELP = "folder of a run or of a sweep"


def run(argv: list[str]) -> int:
    """Run the action that the first word names; without one, show runs."""
    if argv and argv[0] in ACTIONS:
        return ACTIONS[argv[0]].run(argv[1:])
    return _show(argv)


def _show(argv: list[str]) -> int:
    """Print a table, one run in detail, or JSON."""
    from ..slurm.jobs_text import describe, problems, to_json, watch, write_table

    arguments = _parse_show(argv)
    if arguments.watch:
        try:
            watch(lambda: _read_status(arguments, tries=1), sys.stdout, _describe_none(arguments))
        except KeyboardInterrupt:  # the normal way to end it
            say("\n")
        return 0
    status, names = _read_status(arguments)
    if arguments.json:
        say(to_json(status))
    elif not status:
        say(_describe_none(arguments))
    elif len(status) == 1 and arguments.runs:
        say(describe(status[0]))
    else:
        write_table(status, names, sys.stdout)
    say_aside("".join(f"graftvit: {problem}" for problem in problems(status)))
    return 0


def _parse_show(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "jobs",
        "Show runs on a cluster: state, restarts and their reasons, nodes, progress and time left; for a waiting run "
        "why it waits and when it is expected to start. This is read from the files of each run, and checked with the "
        "scheduler if it answers.\n\n"
        f"{describe_actions(ACTIONS)}\n\n`graftvit jobs ACTION --help` explains an action.",
        EXAMPLES,
        usage="[ACTION] [RUN ...] [--active] [--last N] [--watch | --json]",
    )
    parser.add_argument("runs", type=run_folder, nargs="*", metavar="RUN", help=RUNS_HELP)
    parser.switch("--active", "only runs that wait or run")
    parser.flag("--last", "only the N runs that were submitted last", type=whole(1), metavar="N")
    parser.switch(
        "--watch",
        "redraw the table until no run is active, or Ctrl-C; in a pipe, print it when a state has changed",
    )
    parser.switch("--json", "print all known facts as JSON, for scripts")
    arguments = parser.parse_args(argv)
    if arguments.watch and arguments.json:
        raise ConfigError("--watch and --json cannot be combined: give one of them")
    return arguments


def _read_status(arguments: argparse.Namespace, **asking: int) -> tuple[Sequence[RunStatus], Sequence[str]]:
    """Return the current status of the runs, and their names."""
    from ..slurm.jobs import describe_runs

    names = _name_runs(arguments.runs)
    found = list(zip(describe_runs(names, **asking), names.values(), strict=True))
    if arguments.active:
        found = [(run, name) for run, name in found if run.active]
    if arguments.last is not None:
        found = sorted(found, key=lambda entry: entry[0].submitted)[-arguments.last :]
    return [run for run, _ in found], [name for _, name in found]


def _name_runs(given: Sequence[Path]) -> dict[Path, str]:
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


def _describe_none(arguments: argparse.Namespace) -> str:
    if arguments.active:
        return "no run waits or runs\n"
    return (
        "no run of this user is listed: `graftvit jobs FOLDER` shows a run by its folder, `graftvit submit --help` "
        "explains how to submit\n"
    )


def _logs(argv: list[str]) -> int:
    """Print the end of the logs of the job that `graftvit jobs` shows; with --follow also new lines."""
    from ..slurm.job_folder import JobFolder
    from ..slurm.jobs import run_folders, shown_submission

    arguments = _parse_logs(argv)
    folders = run_folders(arguments.run)
    folder = arguments.run.absolute()
    if folders != [folder]:
        raise ConfigError(
            f"{folder} has several runs: choose one, as in `{hint('jobs', 'logs', folders[0])}`"
        )
    submission = shown_submission(folder)
    _check_rank(folder, submission, arguments)
    paths = _find_logs(JobFolder(folder), submission, arguments.rank)
    followers: dict[Path, Follower] = {}
    shown = (_show_merged if arguments.rank is None else _show_end)(paths(), arguments.lines, followers)
    if arguments.follow:
        _follow(folder, paths, followers, arguments.rank, shown)
    elif shown is None:
        say_aside(f"graftvit: there is no log yet: `{hint('jobs', folder)}` shows the state of the run\n")
    return 0


def _parse_logs(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "jobs logs",
        "Print the standard error and standard output of one process of a run. With `--rank all`, print the lines of "
        "all processes, merged by the times in lines of torch, submitit and Slurm; a line without a time stays after "
        "the line before it.",
        EXAMPLES,
        "RUN [--rank K|all] [--lines N] [--follow]",
    )
    parser.add_argument(
        "run", type=run_folder, metavar="RUN", help="folder of a run, or of a cell of a sweep"
    )
    parser.add_argument(
        "--rank", default="0", metavar="K", help="process, or all (default: 0, the first one)"
    )
    parser.flag("--lines", "last lines of each file", type=whole(0), default=50)
    parser.add_argument(
        "--follow", "-f", action="store_true", help="print new lines until the run has ended, or Ctrl-C"
    )
    arguments = parser.parse_args(argv)
    if arguments.rank != "all" and not arguments.rank.isdecimal():
        raise ConfigError(f"--rank {arguments.rank}: give all, or the number of a process, 0 or more")
    arguments.rank = None if arguments.rank == "all" else int(arguments.rank)
    return arguments


def _check_rank(folder: Path, submission: Submission | None, arguments: argparse.Namespace) -> None:
    from ..slurm.logs import ranks_with_logs

    there = [] if submission is None else ranks_with_logs(submission)
    if there and arguments.rank not in (None, *there) and not arguments.follow:
        raise ConfigError(
            f"--rank {arguments.rank} has no log in {folder}: ranks with logs are {_format_ranges(there)}"
        )


def _find_logs(
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
    say("".join(f"{_split_progress(line)}\n" for line in found))
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
            say(with_rank(path, _split_progress(text), followers))
            sys.stdout.flush()
        else:
            shown = _write(path, text, shown)
    status = describe_run(folder)
    say_aside(f"graftvit: the run is {status.state}{f': {status.why}' if status.why else ''}\n")


def _write(path: Path, text: str, shown: Path | None) -> Path:
    """Print `text`, after the name of its file if the previous text came from another file."""
    if path != shown:
        say(f"==> {path} <==\n")
    lines = _split_progress(text)
    say(lines if lines.endswith("\n") else f"{lines}\n")
    sys.stdout.flush()
    return path


def _split_progress(text: str) -> str:
    """Return progress bars that overwrite their line as separate lines."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _format_ranges(ranks: list[int]) -> str:
    return f"0 to {ranks[-1]}" if ranks == list(range(len(ranks))) else ", ".join(map(str, ranks))


def _stop(argv: list[str]) -> int:
    """Stop the waiting and running jobs of each folder."""
    parser = command_parser(
        "jobs stop",
        "Tell a running job to save and end, and cancel a waiting one. `graftvit jobs resume` continues from its "
        "state.",
        EXAMPLES,
        "RUN ... [--now]",
    )
    parser.add_argument("runs", type=run_folder, nargs="+", metavar="RUN", help=RUNS_HELP)
    parser.switch("--now", "do not wait for a save")
    arguments = parser.parse_args(argv)
    return max(_stop_one(folder, arguments.now) for folder in arguments.runs)


def _stop_one(folder: Path, now: bool) -> int:
    """Stop one folder and return the exit code. An error is printed, so that the other folders are still stopped."""
    from ..slurm.jobs import describe_runs, run_folders
    from ..slurm.stopping import stop

    try:
        stopped = stop(folder, now=now)
        if not stopped.done + stopped.failed:
            states = sorted({status.state for status in describe_runs(run_folders(folder))})
            say(f"{folder} has no waiting or running job: it is {', '.join(states)}\n")
    except (GraftError, OSError) as error:
        say_aside(f"graftvit: error: {error}\n")
        return error.exit_code if isinstance(error, GraftError) else 1
    for sentence in stopped.done:
        say(f"{sentence}\n")
    for sentence in stopped.failed:
        say_aside(f"graftvit: error: {sentence}\n")
    return 1 if stopped.failed else 0


def _resume(argv: list[str]) -> int:
    """Submit the unfinished runs of a folder again."""
    from ..slurm.lock import stoppable
    from ..slurm.preview import preview_again
    from ..slurm.setting_layers import add_cluster_flags, asked_by, describe
    from ..slurm.stopping import find_unfinished, resume, wait_for_stops

    parser = command_parser(
        "jobs resume",
        "Submit a run again with its own settings, from its last state. For a sweep, submit the cells that are not "
        "finished and have no job. The resources are those of the last submission, except those that flags change; "
        "the code is the one that is installed now.",
        EXAMPLES,
        "RUN [--flag value ...]",
    )
    parser.add_argument("run", type=run_folder, metavar="RUN", help="a run folder, or the folder of a sweep")
    parser.switch(
        "--dry_run", "print the plan, the requested resources, the sbatch script and any error, and stop"
    )
    add_cluster_flags(parser, again=True)
    arguments = parser.parse_args(argv)
    with stoppable():
        if not arguments.dry_run:
            wait_for_stops(arguments.run)
        unfinished = find_unfinished(arguments.run)
        asked = asked_by(arguments, unfinished.resources)
        config = asked.config()
        if arguments.dry_run:
            shown = preview_again(unfinished, config, unchecked=arguments.unchecked)
            say(f"{describe(asked)}\n{shown.text}")
            if shown.problem is not None:
                raise shown.problem
            return 0
        say(resume(unfinished, config, unchecked=arguments.unchecked))
    return 0


def _forget(argv: list[str]) -> int:
    """Remove runs from the list."""
    from ..slurm.jobs import forget_ended, forget_run

    parser = command_parser(
        "jobs forget",
        "Remove runs from the list of `graftvit jobs`. Their folders do not change; `graftvit jobs RUN` shows them. "
        "A run returns to the list when it is submitted or resumed. A run that has a job cannot be removed.",
        EXAMPLES,
        "RUN ... | --ended",
    )
    parser.add_argument("runs", type=run_folder, nargs="*", metavar="RUN", help=RUNS_HELP)
    parser.switch("--ended", "all runs in the list that have no job")
    arguments = parser.parse_args(argv)
    if bool(arguments.runs) == arguments.ended:
        raise ConfigError("give either the runs to forget, or --ended for all runs that have no job")
    for folder in arguments.runs:
        forget_run(folder)
    forgotten = forget_ended() if arguments.ended else arguments.runs
    say("".join(f"forgotten: {folder}\n" for folder in forgotten) or "no run in the list has ended\n")
    return 0


def _summary(argv: list[str]) -> int:
    """Print the table as Markdown and write the three files."""
    parser = command_parser(
        "jobs summary",
        "Print the results of the finished cells of a sweep: one row for each setting, mean ± standard deviation over "
        "seeds, and the cells that failed or are not finished. Accuracies are in percent, after the last epoch and at "
        "the best one. The tables and a plot are written to FOLDER as summary.csv, summary.md and summary.png.",
        EXAMPLES,
        "FOLDER",
    )
    parser.add_argument("folder", type=run_folder, metavar="FOLDER", help="the output_dir of the sweep")
    arguments = parser.parse_args(argv)
    from ..slurm.summary import summarize, to_markdown, write_summary

    summary = summarize(arguments.folder)
    say(to_markdown(summary))
    for path in write_summary(summary):
        say_aside(f"{path}\n")
    return 0


ACTIONS = {
    "logs": Action("print the logs of a run", _logs),
    "stop": Action("save and end a running job, cancel a waiting one", _stop),
    "resume": Action("submit a run again from its last state, on the same nodes or on others", _resume),
    "forget": Action("remove a run from the list, and keep its folder", _forget),
    "summary": Action("summarize a sweep: mean ± std over seeds as CSV, Markdown and a plot", _summary),
}
