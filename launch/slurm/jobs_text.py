"""How runs look in a terminal, in a pipe and as JSON."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TextIO

from ...models.errors import escaped
from .jobs import RunStatus
from .progress import Progress

COLUMNS = ("run", "job", "state", "nodes", "progress", "left", "img/s", "top-1", "restarts")


def to_json(runs: Sequence[RunStatus]) -> str:
    """One list of objects; times are Unix times, durations seconds."""
    return json.dumps([asdict(run) for run in runs], indent=2, default=str) + "\n"


def write_table(runs: Sequence[RunStatus], names: Sequence[str], file: TextIO) -> None:
    """A line a run, and below it how many there are in each state."""
    rows = [[escaped(word) for word in _row(run, name)] for run, name in zip(runs, names, strict=True)]
    if file.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*COLUMNS, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        Console(file=file, markup=False, highlight=False).print(table)
    else:
        lines = [COLUMNS, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
        for line in lines:
            text = "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True))
            file.write(f"{text.rstrip()}\n")
    if len(runs) > 1:
        counts = Counter(run.state for run in runs)
        file.write(f"{len(runs)} runs: {', '.join(f'{count} {state}' for state, count in counts.items())}\n")


def describe(run: RunStatus) -> str:
    """One run at length."""
    processes = f" ({run.world_size} processes)" if run.world_size else ""
    limit = f"; its limit ends it at {_clock(run.ends)}" if run.ends else ""
    lines = [
        ("run", str(run.folder)),
        ("job", f"{run.job_id} ({run.cluster}), submitted {_clock(run.submitted)}"),
        ("state", f"{run.state}{f': {run.why}' if run.why else ''}{limit}"),
        ("nodes", f"{' '.join(run.nodes)}{processes}" if run.nodes else ""),
        ("progress", _progress(run.progress, long=True)),
        ("left", duration(run.progress.seconds_left) if run.active else ""),
        ("speed", _number(run.progress.images_per_second, "{:.0f} images/s")),
        ("top-1", _scores(run.progress)),
        ("restarts", str(len(run.restarts)) if run.restarts else ""),
    ]
    text = "".join(f"{name:<10}{value}\n" for name, value in lines if value)
    for restart in run.restarts:
        where = f" on {' '.join(restart.nodes)}" if restart.nodes else ""
        text += f"  {_clock(restart.started)}  attempt {restart.attempt}{where}, after: {restart.why}\n"
    if run.error:
        who = "" if run.error_rank is None else f" of rank {run.error_rank}"
        text += f"last words{who}:\n" + "".join(f"  {line}\n" for line in run.error.splitlines())
    if not run.active and run.state != "finished":
        text += f"`graftvit resume {run.folder}` goes on with it\n"
    return text


def duration(seconds: float | None) -> str:
    """`2-03:04:05`, as Slurm writes it; nothing for None."""
    if seconds is None:
        return ""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02d}:{minute:02d}:{second:02d}" if days else f"{hour}:{minute:02d}:{second:02d}"


def _row(run: RunStatus, name: str) -> tuple[str, ...]:
    why = run.why if len(run.why) <= 40 else f"{run.why[:39]}…"
    nodes = f"{run.nodes[0]} +{len(run.nodes) - 1}" if len(run.nodes) > 2 else " ".join(run.nodes)
    progress = run.progress
    return (
        name,
        run.job_id,
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
        words.append(f", {progress.epoch} of {progress.epochs} epochs done")
    return " ".join(words).replace(" ,", ",")


def _scores(progress: Progress) -> str:
    if progress.best_top1 is None or progress.last_top1 is None:
        return ""
    return f"best {progress.best_top1:.2f}, last {progress.last_top1:.2f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
