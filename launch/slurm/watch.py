"""Watching runs: the table is drawn anew in a terminal, and written again in a pipe where a state has changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TextIO

from .jobs import RunStatus
from .jobs_text import count_states, rich_table, write_table

EVERY = 10.0
"""Seconds between two questions to the scheduler."""
Seen = tuple[Sequence[RunStatus], Sequence[str]]
Show = Callable[[Sequence[RunStatus], Sequence[str]], None]


def watch(look: Callable[[], Seen], file: TextIO, none: str) -> None:
    """Shows runs until none waits or runs any more.

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
    """What kept the scheduler from being asked, once."""
    found = dict.fromkeys(run.problem for run in runs if run.problem)
    return [f"what the files say, for {problem}\n" for problem in found]
