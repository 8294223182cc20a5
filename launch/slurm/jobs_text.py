"""Print runs for a terminal, for a pipe and as JSON. Names of runs are quoted for the shell.

`--watch` draws the table again in a terminal; in a pipe it writes the table when a state has changed.
"""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from ...models.errors import counted, escaped
from ..say import hint
from .job_folder import resumes
from .jobs import Progress, RunStatus
from .judging import clock

if TYPE_CHECKING:
    from rich.table import Table


COLUMNS = ("run", "job", "state", "nodes", "progress", "left", "img/s", "top-1", "restarts")
WIDEST_WHY = 60


def to_json(runs: Sequence[RunStatus]) -> str:
    """Return one list of objects; times are Unix times, durations seconds."""
    return json.dumps([asdict(run) for run in runs], indent=2, default=str) + "\n"


def write_table(runs: Sequence[RunStatus], names: Sequence[str], file: TextIO) -> None:
    """Write a line for each run, and below it the number of runs in each state."""
    if file.isatty():
        from rich.console import Console

        Console(file=file, markup=False, highlight=False).print(rich_table(runs, names))
    else:
        rows = [COLUMNS, *_rows(runs, names)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        for row in rows:
            text = "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))
            file.write(f"{text.rstrip()}\n")
    file.write(count_states(runs))


def rich_table(runs: Sequence[RunStatus], names: Sequence[str]) -> Table:
    """Return the table for a terminal; names of runs stay whole, so that they can be copied."""
    from rich.table import Table

    rows = _rows(runs, names)
    table = Table(box=None, pad_edge=False)
    table.add_column(COLUMNS[0], no_wrap=True, min_width=max((len(row[0]) for row in rows), default=0))
    for name in COLUMNS[1:]:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    return table


def count_states(runs: Sequence[RunStatus]) -> str:
    """Return the number of runs in each state; empty for one run."""
    if len(runs) < 2:
        return ""
    counts = Counter(run.state for run in runs)
    return f"{len(runs)} runs: {', '.join(f'{count} {state}' for state, count in counts.items())}\n"


def describe(run: RunStatus) -> str:
    """Return the details of one run."""
    processes = f" ({counted(run.world_size, 'process')})" if run.world_size else ""
    limit = f"; its limit ends it at {_clock(run.ends)}" if run.ends else ""
    lines = [
        ("run", str(run.folder)),
        ("job", f"{run.job_id} ({run.cluster}), submitted {_clock(run.submitted)}"),
        ("state", f"{run.state}{f': {run.why}' if run.why else ''}{limit}"),
        ("starts", f"expected at {clock(run.starts)}" if run.starts else ""),
        (
            "also",
            f"job {', '.join(run.others)} of this folder: it was submitted several times"
            if run.others
            else "",
        ),
        ("command", run.command),
        ("output", _output(run)),
        ("nodes", f"{' '.join(run.nodes)}{processes}" if run.nodes else ""),
        ("progress", _progress(run.progress, long=True)),
        ("left", _left(run)),
        ("speed", _number(run.progress.images_per_second, "{:.0f} images/s")),
        ("top-1", _scores(run.progress)),
        ("restarts", str(len(run.restarts)) if run.restarts else ""),
    ]
    text = "".join(f"{name:<10}{value}\n" for name, value in lines if value)
    for restart in run.restarts:
        where = f" on {' '.join(restart.nodes)}" if restart.nodes else ""
        text += f"  {_clock(restart.started)}  attempt {restart.attempt}{where}, after: {restart.why}\n"
    if run.error:
        text += f"{_speaker(run)}:\n" + "".join(f"  {line}\n" for line in run.error.splitlines())
    if not run.active and run.state != "finished":
        text += f"`{resumes(run.folder)}` resumes it\n"
    return text


def _output(run: RunStatus) -> str:
    """Return where the result of a finished command is."""
    if not run.command or run.state != "finished":
        return ""
    return f"{run.output}, and what it printed: " * bool(run.output) + f"`{hint('jobs', 'logs', run.folder)}`"


def duration(seconds: float | None) -> str:
    """`2-03:04:05`, as Slurm writes it; nothing for None."""
    if seconds is None:
        return ""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02d}:{minute:02d}:{second:02d}" if days else f"{hour}:{minute:02d}:{second:02d}"


def _speaker(run: RunStatus) -> str:
    """Whose words the error is."""
    if run.error.startswith(("srun:", "slurmstepd")):
        return "what Slurm wrote"
    return "last words" if run.error_rank is None else f"last words of rank {run.error_rank}"


def _left(run: RunStatus) -> str:
    """Return the time that the run still needs."""
    if not run.active or run.state == "stopping" or run.progress.seconds_left is None:
        return ""
    return duration(run.progress.seconds_left) + ("" if run.state == "running" else " once it runs")


def _rows(runs: Sequence[RunStatus], names: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(escaped(word) for word in _row(run, name)) for run, name in zip(runs, names, strict=True)]


def _row(run: RunStatus, name: str) -> tuple[str, ...]:
    why = run.why if len(run.why) <= WIDEST_WHY else f"{run.why[: WIDEST_WHY - 1]}…"
    if run.starts and run.state == "pending" and "until" not in why:
        why = f"{why}; expected at {clock(run.starts)}"
    nodes = f"{run.nodes[0]} +{len(run.nodes) - 1}" if len(run.nodes) > 2 else " ".join(run.nodes)
    progress = run.progress
    return (
        shlex.quote(name),
        " ".join([run.job_id, *(f"+{job}" for job in run.others)]),
        f"{run.state}{f' ({why})' if why else ''}",
        nodes,
        _progress(progress),
        duration(progress.seconds_left) if run.active else "",
        _number(progress.images_per_second, "{:.0f}"),
        _number(progress.best_top1, "{:.2f}"),
        str(len(run.restarts) or ""),
    )


def _progress(progress: Progress, *, long: bool = False) -> str:
    if not progress.step and not progress.stage:
        return ""
    words = [f"{progress.stage}:"] if progress.stage else []
    if progress.total_steps:
        words.append(f"{100 * progress.step / progress.total_steps:.0f} %")
    if long or not progress.total_steps:
        total = f" of {progress.total_steps}" if progress.total_steps else ""
        words.append(f"{', ' if progress.total_steps else ''}step {progress.step}{total}")
    if long and progress.epochs:
        words.append(f", {progress.epoch} of {counted(progress.epochs, 'epoch')} done")
    return " ".join(words).replace(" ,", ",")


def _scores(progress: Progress) -> str:
    if progress.best_top1 is None or progress.last_top1 is None:
        return ""
    return f"best {progress.best_top1:.2f}, last {progress.last_top1:.2f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


EVERY = 10.0
"""Seconds between two questions to the scheduler."""
Seen = tuple[Sequence[RunStatus], Sequence[str]]
Show = Callable[[Sequence[RunStatus], Sequence[str]], None]


def watch(look: Callable[[], Seen], file: TextIO, none: str) -> None:
    """Show runs until none waits or runs any more.

    Args:
        look: Gives the runs as they are now, and their names.
        file: A terminal, or anything else.
        none: What is said where there is no run to show.
    """
    with ExitStack() as stack:
        show = _in_terminal(stack, file, none) if file.isatty() else _in_pipe(file, none)
        while True:
            runs, names = look()
            show(runs, names)
            if all(run.over for run in runs):
                return
            time.sleep(EVERY)


def _in_terminal(stack: ExitStack, file: TextIO, none: str) -> Show:
    from rich.console import Console, Group
    from rich.live import Live

    console = Console(file=file, markup=False, highlight=False)
    live = stack.enter_context(Live(console=console, auto_refresh=False, vertical_overflow="visible"))

    def show(runs: Sequence[RunStatus], names: Sequence[str]) -> None:
        if not runs:
            live.update(none.rstrip(), refresh=True)
            return
        below = [count_states(runs), time.strftime("%H:%M:%S, Ctrl-C ends the watching alone\n")]
        live.update(Group(rich_table(runs, names), "".join([*below, *problems(runs)]).rstrip()), refresh=True)

    return show


def _in_pipe(file: TextIO, none: str) -> Show:
    before: list[object] = [None]

    def show(runs: Sequence[RunStatus], names: Sequence[str]) -> None:
        now: list[object] = [
            (run.folder, run.job_id, run.state, run.why, run.nodes, len(run.restarts)) for run in runs
        ]
        if now != before:
            file.write(time.strftime("%Y-%m-%d %H:%M:%S\n"))
            if runs:
                write_table(runs, names, file)
            else:
                file.write(none)
            file.write("".join(problems(runs)))
            file.flush()
            before[:] = now

    return show


def problems(runs: Sequence[RunStatus]) -> list[str]:
    """Return why the scheduler could not be asked, once."""
    found = dict.fromkeys(run.problem for run in runs if run.problem)
    return [f"what the files say, for {problem}\n" for problem in found]
