"""`graftvit jobs`: show the runs on a cluster; print their logs; stop and resume them; summarize a sweep."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.errors import ConfigError, GraftError
from ..flags import Action, command_parser, describe_actions, run_folder, whole
from ..say import hint, say, say_aside
from .submit import show_or_send

if TYPE_CHECKING:
    from ..slurm.folder import Job, JobFolder
    from ..slurm.jobs import Status

EXAMPLES = (
    "graftvit jobs                         # all runs that this user submitted from here",
    "graftvit jobs /scratch/me/distill     # one run in detail: restarts and reasons, the error of the failed rank",
    "graftvit jobs /scratch/me/sweep       # one line for each cell",
    "graftvit jobs --active --watch        # repeat the table of waiting and running runs until none is left",
    "graftvit jobs --failed                # the runs that failed",
    "graftvit jobs --last 5                # the five runs that were submitted last",
    "graftvit jobs --json | jq '.[].state'",
    "graftvit jobs /scratch/me/sweep --cost    # GPU hours, hours in the queue, steps lost",
    "graftvit jobs logs /scratch/me/distill --follow",
    "graftvit jobs logs /scratch/me/distill --rank 3 --lines 200",
    "graftvit jobs logs /scratch/me/distill --rank all    # all ranks, one after the other",
    "graftvit jobs stop /scratch/me/distill          # save after the next step, then end; not requeued",
    "graftvit jobs stop /scratch/me/distill --now    # end at once; the last saved state remains",
    "graftvit jobs stop /scratch/me/sweep            # stop all cells that wait or run",
    "graftvit jobs stop /scratch/me/a /scratch/me/b  # stop several runs",
    "graftvit jobs resume /scratch/me/distill",
    "graftvit jobs resume /scratch/me/distill --nodes 4 --time 1-00:00:00    # on fewer nodes, the same global batch",
    "graftvit jobs resume /scratch/me/distill --nodes 2 --dry_run            # how the batch would be shared",
    "graftvit jobs resume /scratch/me/sweep                                  # the cells that failed or were stopped",
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
    from ..slurm.jobs_text import cost_table, describe, problems, to_json, watch, write_table

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
    elif arguments.cost:
        say(cost_table([run.run for run in status]))
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
        usage="[ACTION] [RUN ...] [--active | --failed] [--last N] [--watch | --json | --cost]",
    )
    parser.add_argument("runs", type=run_folder, nargs="*", metavar="RUN", help=RUNS_HELP)
    parser.switch("--active", "only runs that wait or run")
    parser.switch("--failed", "only runs whose state is failed")
    parser.flag("--last", "only the N runs that were submitted last", type=whole(1), metavar="N")
    parser.switch(
        "--watch", "print the table each time that a state has changed, until no run is active, or Ctrl-C"
    )
    parser.switch("--json", "print all known facts as JSON, for scripts")
    parser.switch("--cost", "hours of GPUs and of the queue, by Slurm's accounting, and steps lost")
    arguments = parser.parse_args(argv)
    if arguments.failed and (arguments.active or arguments.watch):
        raise ConfigError(
            "--failed shows runs that have ended: it cannot be combined with --active or --watch"
        )
    if sum((arguments.watch, arguments.json, arguments.cost)) > 1:
        raise ConfigError("--watch, --json and --cost cannot be combined: give one of them")
    return arguments


def _read_status(arguments: argparse.Namespace, **asking: int) -> tuple[Sequence[Status], Sequence[str]]:
    """Return the current status of the runs, and their names."""
    from ..slurm.jobs import describe_runs

    names = _name_runs(arguments.runs)
    found = list(zip(describe_runs(names, **asking), names.values(), strict=True))
    if arguments.active:
        found = [(run, name) for run, name in found if run.active]
    if arguments.failed:
        found = [(run, name) for run, name in found if run.state == "failed"]
    if arguments.last is not None:
        found = sorted(found, key=lambda entry: entry[0].job.submitted)[-arguments.last :]
    return [run for run, _ in found], [name for _, name in found]


def _name_runs(given: Sequence[Path]) -> dict[Path, str]:
    """Map each run folder to its name: a path that every command accepts in this folder."""
    from ..slurm.folder import known
    from ..slurm.jobs import run_folders

    names = {}
    for folder in given or known():
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
    if arguments.failed:
        return "no run has failed\n"
    return (
        "no run of this user is listed: `graftvit jobs FOLDER` shows a run by its folder, `graftvit submit --help` "
        "explains how to submit\n"
    )


def _logs(argv: list[str]) -> int:
    """Print the end of the logs of the job that `graftvit jobs` shows; with --follow also new lines."""
    from ..slurm.folder import JobFolder
    from ..slurm.jobs import run_folders, shown_job

    arguments = _parse_logs(argv)
    folders = run_folders(arguments.run)
    folder = arguments.run.absolute()
    if folders != [folder]:
        raise ConfigError(
            f"{folder} has several runs: choose one, as in `{hint('jobs', 'logs', folders[0])}`"
        )
    job = shown_job(folder)
    _check_rank(folder, job, arguments)
    paths = _find_logs(JobFolder(folder), job, arguments.rank)
    places: dict[Path, int] = {}
    shown = _show_end(paths(), arguments.lines, places)
    if arguments.follow:
        _follow(folder, paths, places, shown)
    elif shown is None:
        say_aside(f"graftvit: there is no log yet: `{hint('jobs', folder)}` shows the state of the run\n")
    return 0


def _parse_logs(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "jobs logs",
        "Print the standard error and standard output of one process of a run, or of all.",
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


def _check_rank(folder: Path, job: Job | None, arguments: argparse.Namespace) -> None:
    from ..slurm.failures import ranks_with_logs

    there = [] if job is None else ranks_with_logs(job)
    if there and arguments.rank not in (None, *there) and not arguments.follow:
        raise ConfigError(
            f"--rank {arguments.rank} has no log in {folder}: ranks with logs are {_format_ranges(there)}"
        )


def _find_logs(files: JobFolder, job: Job | None, rank: int | None) -> Callable[[], tuple[Path, ...]]:
    """Return a function that finds the logs of a job, or of a newer job after the run is submitted again."""
    from ..slurm.failures import all_files, log_files

    first = files.job()

    def paths() -> tuple[Path, ...]:
        newest = files.job()
        shown = job if newest == first else newest
        if shown is None:
            return ()
        return all_files(shown) if rank is None else log_files(shown, rank)

    return paths


def _show_end(paths: tuple[Path, ...], lines: int, places: dict[Path, int]) -> Path | None:
    """Print the end of each file, and return the last file printed."""
    from ..slurm.failures import tail

    shown = None
    for path in paths:
        places[path] = path.stat().st_size if path.exists() else 0
        text = tail(path, lines)
        if text:
            shown = _write(path, text, shown)
    return shown


def _follow(
    folder: Path,
    paths: Callable[[], tuple[Path, ...]],
    places: dict[Path, int],
    shown: Path | None,
) -> None:
    from ..slurm.failures import follow
    from ..slurm.jobs import describe_runs

    for path, text in follow(paths, lambda: describe_runs([folder])[0].over, places):
        shown = _write(path, text, shown)
    (status,) = describe_runs([folder])
    say_aside(f"graftvit: the run is {status.state}{f': {status.why}' if status.why else ''}\n")


def _write(path: Path, text: str, shown: Path | None) -> Path:
    """Print `text`, after the name of its file if the previous text came from another file."""
    if path != shown:
        say(f"==> {path} <==\n")
    lines = text.replace("\r\n", "\n").replace("\r", "\n")  # a progress bar overwrites its line
    say(lines if lines.endswith("\n") else f"{lines}\n")
    sys.stdout.flush()
    return path


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
    from ..slurm.stop import stop

    try:
        done, failed = stop(folder, now=now)
        if not done + failed:
            runs = describe_runs(run_folders(folder))
            failed = [
                f"{one.words} of {one.run} may continue: {one.why or one.state}"
                for one in runs
                if not one.over
            ]
        if not done + failed:
            states = sorted({status.state for status in runs})
            say(f"{folder} has no waiting or running job: it is {', '.join(states)}\n")
    except (GraftError, OSError) as error:
        say_aside(f"graftvit: error: {error}\n")
        return error.exit_code if isinstance(error, GraftError) else 1
    for sentence in done:
        say(f"{sentence}\n")
    for sentence in failed:
        say_aside(f"graftvit: error: {sentence}\n")
    return 1 if failed else 0


def _resume(argv: list[str]) -> int:
    """Submit the unfinished runs of a folder again."""
    from ..slurm.lock import stoppable
    from ..slurm.plan import asked_before, plan_again, unfinished
    from ..slurm.site_file import add_cluster_flags, asked_by
    from ..slurm.stop import wait_for_stops

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
        jobs = unfinished(arguments.run)
        request = asked_by(arguments, asked_before(jobs))
        return show_or_send(arguments, plan_again(arguments.run, jobs, request))


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
    from ..summary import summarize, to_markdown, write_summary

    rows = summarize(arguments.folder)
    say(to_markdown(rows))
    for path in write_summary(arguments.folder, rows):
        say_aside(f"{path}\n")
    return 0


ACTIONS = {
    "logs": Action("print the logs of a run", _logs),
    "stop": Action("save and end a running job, cancel a waiting one", _stop),
    "resume": Action("submit a run again from its last state, on the same nodes or on others", _resume),
    "summary": Action("summarize a sweep: mean ± std over seeds as CSV, Markdown and a plot", _summary),
}
