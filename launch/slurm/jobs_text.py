"""Print runs as a table, one at length, and as JSON. Names of runs are quoted for the shell."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from ...models.errors import counted, escaped
from ...transfer.analysis.report.tables import aligned
from ..say import hint
from .folder import JobFolder, resumes
from .jobs import Progress, Status
from .scheduler import clock, usage_of

COLUMNS = ("run", "job", "state", "nodes", "progress", "left", "img/s", "top-1", "restarts")
WIDEST_WHY = 60


def to_json(runs: Sequence[Status]) -> str:
    """Return one list of objects; times are Unix times, durations seconds."""
    return json.dumps([asdict(run) for run in runs], indent=2, default=str) + "\n"


def write_table(runs: Sequence[Status], names: Sequence[str], file: TextIO) -> None:
    """Write a line for each run, and below it the number of runs in each state."""
    file.write(aligned([COLUMNS, *_rows(runs, names)]) + count_states(runs))


def count_states(runs: Sequence[Status]) -> str:
    """Return the number of runs in each state; empty for one run."""
    if len(runs) < 2:
        return ""
    counts = Counter(run.state for run in runs)
    return f"{len(runs)} runs: {', '.join(f'{count} {state}' for state, count in counts.items())}\n"


def describe(run: Status) -> str:
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
        ("restarts", str(run.restarts or "")),
    ]
    text = "".join(f"{name:<10}{value}\n" for name, value in lines if value)
    for restart in run.history:
        where = f" on {' '.join(restart.nodes)}" if restart.nodes else ""
        text += f"  {_clock(restart.started)}  attempt {restart.attempt}{where}, after: {restart.why}\n"
    if run.error:
        text += f"{_speaker(run)}:\n" + "".join(f"  {line}\n" for line in run.error.splitlines())
    if not run.active and run.state != "finished":
        text += f"`{resumes(run.folder)}` resumes it\n"
    return text


def _output(run: Status) -> str:
    """Return where the result of a finished command is."""
    if not run.command or run.state != "finished":
        return ""
    return f"{run.output}, and what it printed: " * bool(run.output) + f"`{hint('jobs', 'logs', run.folder)}`"


def cost_table(folders: Sequence[Path]) -> str:
    """Return what each run has cost: hours of GPUs and of the queue by the accounting, steps lost by its own records.

    Raises GraftError: there is no accounting.
    """
    jobs = {folder: [one.job_id for one in JobFolder(folder).jobs()] for folder in folders}
    ids = [job for known in jobs.values() for job in known if job]
    used = usage_of(ids) if ids else []
    heads = ("run", "starts", "GPU hours", "core hours", "hours running", "hours in the queue", "steps lost")
    rows: list[tuple[str, ...]] = [heads]
    for folder, known in jobs.items():
        own = [one for one in used if one.job_id in known]
        hours = (
            sum(one.ran * one.gpus for one in own), sum(one.ran * one.cores for one in own),
            sum(one.ran for one in own), sum(one.waited for one in own),
        )  # fmt: skip
        lost = sum(attempt.lost for attempt in JobFolder(folder).attempts())
        rows.append(
            (shlex.quote(str(folder)), str(len(own)), *(f"{one / 3600:.2f}" for one in hours), str(lost))
        )
    return aligned(rows, right=(1, 2, 3, 4, 5, 6))


def duration(seconds: float | None) -> str:
    """`2-03:04:05`, as Slurm writes it; nothing for None."""
    if seconds is None:
        return ""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02d}:{minute:02d}:{second:02d}" if days else f"{hour}:{minute:02d}:{second:02d}"


def _speaker(run: Status) -> str:
    """Whose words the error is."""
    if run.error.startswith(("srun:", "slurmstepd")):
        return "what Slurm wrote"
    return "last words" if run.error_rank is None else f"last words of rank {run.error_rank}"


def _left(run: Status) -> str:
    """Return the time that the run still needs."""
    if not run.active or run.state == "stopping" or run.progress.seconds_left is None:
        return ""
    return duration(run.progress.seconds_left) + ("" if run.state == "running" else " once it runs")


def _rows(runs: Sequence[Status], names: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(escaped(word) for word in _row(run, name)) for run, name in zip(runs, names, strict=True)]


def _row(run: Status, name: str) -> tuple[str, ...]:
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
        str(run.restarts or ""),
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
Seen = tuple[Sequence[Status], Sequence[str]]


def watch(look: Callable[[], Seen], file: TextIO, none: str) -> None:
    """Write the table each time that a state has changed, until no run waits or runs any more.

    Args:
        look: Gives the runs as they are now, and their names.
        file: Where it is written.
        none: What is said where there is no run to show.
    """
    before: object = None
    while True:
        runs, names = look()
        now = [(run.folder, run.job_id, run.state, run.why, run.nodes, run.restarts) for run in runs]
        if now != before:
            file.write(time.strftime("%Y-%m-%d %H:%M:%S\n"))
            if runs:
                write_table(runs, names, file)
            else:
                file.write(none)
            file.write("".join(problems(runs)))
            file.flush()
        if all(run.over for run in runs):
            return
        before = now
        time.sleep(EVERY)


def problems(runs: Sequence[Status]) -> list[str]:
    """Return why the scheduler could not be asked, once."""
    found = dict.fromkeys(run.problem for run in runs if run.problem)
    return [f"what the files say, for {problem}\n" for problem in found]
