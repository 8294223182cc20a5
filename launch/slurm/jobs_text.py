"""Print runs as a table, one at length, and as JSON. Names of runs are quoted for the shell."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ...models.errors import counted, escaped
from ...transfer.analysis.report.tables import aligned
from ..progress import SCORES, Progress
from ..say import hint
from .folder import JobFolder, read_output
from .jobs import Status
from .scheduler import clock, usage_of

COLUMNS = ("run", "job", "state", "nodes", "progress", "left", "img/s", "score", "restarts")
WIDEST_WHY = 60


def to_json(runs: Sequence[Status]) -> str:
    """Return one list of objects; times are Unix times, durations seconds."""
    return json.dumps([_values(run) for run in runs], indent=2, default=str) + "\n"


def _values(run: Status) -> dict[str, Any]:
    restarts = [
        {"attempt": one.number, "started": one.started, "nodes": one.nodes, "why": one.before}
        for one in run.history
    ]
    return {
        "folder": run.run, "job_id": run.job.job_id, "cluster": run.job.cluster, "submitted": run.job.submitted,
        "state": run.state, "why": run.why, "nodes": run.nodes,
        "world_size": run.last.world_size if run.last else None, "restarts": run.restarts, "history": restarts,
        "progress": asdict(run.progress), "starts": run.starts, "ends": run.ends, "error": run.error.text,
        "error_rank": run.error.rank, "others": run.others, "problem": run.problem,
        "command": _command(run), "output": "" if run.job.is_run else read_output(run.run),
    }  # fmt: skip


def _command(run: Status) -> str:
    return "" if run.job.is_run else shlex.join(["graftvit", *run.job.command])


def write_table(runs: Sequence[Status], names: Sequence[str], file: TextIO) -> None:
    """Write a line for each run, and below it the number of runs in each state."""
    file.write(aligned([COLUMNS, *map(_row, runs, names)]))
    if len(runs) > 1:
        counts = Counter(run.state for run in runs)
        states = ", ".join(f"{count} {state}" for state, count in counts.items())
        file.write(f"{len(runs)} runs: {states}\n")


def describe(run: Status) -> str:
    """Return the details of one run."""
    size = run.last.world_size if run.last else 0
    processes = f" ({counted(size, 'process')})" if size else ""
    limit = f"; its limit ends it at {clock(run.ends)}" if run.ends else ""
    others = f"job {', '.join(run.others)} of this folder: it was submitted several times"
    progress, output = run.progress, read_output(run.run)
    best, last = (_score(progress, value) for value in (progress.best_score, progress.last_score))
    written = f"{output}, and what it printed: " if output else ""
    printed = f"{written}`{hint('jobs', 'logs', run.run)}`"
    lines = [
        ("run", str(run.run)),
        ("job", f"{run.job.job_id or 'none'} ({run.job.cluster}), submitted {clock(run.job.submitted)}"),
        ("state", f"{run.state}{f': {run.why}' if run.why else ''}{limit}"),
        ("starts", f"expected at {clock(run.starts)}" if run.starts else ""),
        ("also", others if run.others else ""),
        ("command", _command(run)),
        ("output", printed if not run.job.is_run and run.state == "finished" else ""),
        ("nodes", f"{' '.join(run.nodes)}{processes}" if run.nodes else ""),
        ("progress", _progress(progress, long=True)),
        ("left", _left(run)),
        ("speed", _number(progress.images_per_second, "{:.0f} images/s")),
        (SCORES.get(progress.metric, ""), f"best {best}, last {last}" if best else ""),
        ("restarts", str(run.restarts or "")),
    ]
    text = "".join(f"{name:<10}{value}\n" for name, value in lines if value)
    for restart in run.history:
        where = f" on {' '.join(restart.nodes)}" if restart.nodes else ""
        text += f"  {clock(restart.started)}  attempt {restart.number}{where}, after: {restart.before}\n"
    if words := run.error.text:
        rank = "" if run.error.rank is None else f" of rank {run.error.rank}"
        by_slurm = words.startswith(("srun:", "slurmstepd"))
        text += "what Slurm wrote:\n" if by_slurm else f"last words{rank}:\n"
        text += "".join(f"  {line}\n" for line in words.splitlines())
    if run.over and run.state != "finished":
        text += f"`{hint('jobs', 'resume', run.run)}` resumes it\n"
    return text


def cost_table(folders: Sequence[Path]) -> str:
    """Return what each run has cost: hours of GPUs and of the queue by the accounting, steps lost by its own records.

    Raises GraftError: there is no accounting.
    """
    jobs = {folder: [one.job_id for one in JobFolder(folder).jobs() if one.job_id] for folder in folders}
    ids = [job for known in jobs.values() for job in known]
    used = usage_of(ids) if ids else []
    heads = ("run", "starts", "GPU hours", "core hours", "hours running", "hours in the queue", "steps lost")
    rows: list[tuple[str, ...]] = [heads]
    for folder, known in jobs.items():
        own = [seconds for job, *seconds in used if job in known]
        hours = [f"{sum(each) / 3600:.2f}" for each in zip(*own, strict=True)] or ["0.00"] * 4
        lost = sum(attempt.lost for attempt in JobFolder(folder).attempts())
        rows.append((shlex.quote(str(folder)), str(len(own)), *hours, str(lost)))
    return aligned(rows, right=(1, 2, 3, 4, 5, 6))


def duration(seconds: float | None) -> str:
    """`2-03:04:05`, as Slurm writes it; nothing for None."""
    if seconds is None:
        return ""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02d}:{minute:02d}:{second:02d}" if days else f"{hour}:{minute:02d}:{second:02d}"


def _left(run: Status) -> str:
    """Return the time that the run still needs."""
    if not run.active or run.state == "stopping" or run.progress.seconds_left is None:
        return ""
    return duration(run.progress.seconds_left) + ("" if run.state == "running" else " once it runs")


def _row(run: Status, name: str) -> tuple[str, ...]:
    why = run.why if len(run.why) <= WIDEST_WHY else f"{run.why[: WIDEST_WHY - 1]}…"
    if run.starts and run.state == "pending" and "until" not in why:
        why = f"{why}; expected at {clock(run.starts)}"
    row = (
        shlex.quote(name),
        " ".join([run.job.job_id, *(f"+{job}" for job in run.others)]),
        f"{run.state}{f' ({why})' if why else ''}",
        f"{run.nodes[0]} +{len(run.nodes) - 1}" if len(run.nodes) > 2 else " ".join(run.nodes),
        _progress(run.progress),
        duration(run.progress.seconds_left) if run.active else "",
        _number(run.progress.images_per_second, "{:.0f}"),
        f"{SCORES.get(run.progress.metric, '')} {_score(run.progress, run.progress.best_score)}".strip(),
        str(run.restarts or ""),
    )
    return tuple(map(escaped, row))


def _progress(progress: Progress, *, long: bool = False) -> str:
    if not progress.step and not progress.stage:
        return ""
    step, total = f"step {progress.step}", progress.total_steps
    words = [f"{100 * progress.step / total:.0f} %"] if total else [step]
    if long and total:
        words.append(f"{step} of {total}")
    if long and progress.epochs:
        words.append(f"{progress.epoch} of {counted(progress.epochs, 'epoch')} done")
    return (f"{progress.stage}: " if progress.stage else "") + ", ".join(words)


def _score(progress: Progress, value: float | None) -> str:
    return _number(value, "{:.2f}" if progress.metric == "top1" else "{:.3f}")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


EVERY = 10.0
"""Seconds between two questions to the scheduler."""
Seen = tuple[Sequence[Status], Sequence[str]]


def watch(look: Callable[[], Seen], file: TextIO, none: str) -> None:
    """Write the table each time that what `look` gives has changed, until no run waits or runs; `none` without one."""
    before: object = None
    while True:
        runs, names = look()
        now = [(run.run, run.job.job_id, run.state, run.why, run.nodes, run.restarts) for run in runs]
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
