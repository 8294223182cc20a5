"""Students of one run that is killed at some of its steps and saves, against the same students alone.

`scenarios.py` calls `main` in a process that has only imported, so that it can fork.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftvit.checkpoints.state import StateFolder
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.loop import Loop
from graftvit.transfer.engine.stages import train_students
from support.runs.engine_killer import start, wait
from support.runs.engine_runs import config, differences, make_teacher

PLANS = {"linear": "*: linear", "hedgehog": "*: hedgehog", "window": "*: window(window=1)"}


def three(kind: str, folder: Path, teacher: Path, **engine: Any) -> dict[str, RunConfig]:
    """Three students that differ in plans, rates, weights and layers."""

    def each(**sections: Any) -> RunConfig:
        return config(folder, teacher, engine=engine, **sections)

    if kind == "align":
        start = {"model": "auto", "model_args": {}, "drop_path": 0.0}
        return {
            name: each(mode="align", student={**start, "plan": plan}, optim={"ema": None})
            for name, plan in PLANS.items()
        }
    if kind == "copy":
        return {
            name: each(transfer={"method": "copy"}, optim={"blr": rate})
            for name, rate in {"slow": 0.01, "middle": 0.03, "fast": 0.1}.items()
        }
    accum = {"accum_iter": 2}
    return {
        "plain": each(transfer={"method": "distill"}, optim=accum),
        "heavy": each(transfer={"method": "distill", "weight": 3.0}, student={"drop_path": 0.0}, optim=accum),
        "last": each(transfer={"method": "distill", "layers": [1]}, optim={"blr": 0.1, **accum}),
    }


def alone(run: RunConfig, name: str) -> RunConfig:
    """The run of one student in a folder of its own."""
    return run.model_copy(update={"output_dir": run.output_dir / name})


def _several(students: dict[str, RunConfig]) -> Any:
    results = train_students(students).results.values()
    return max(results, key=lambda each: each.steps)


def killed_at(number: int, what: str) -> Callable[[int], None]:
    """Kill every process when a step, or a state of a student, is done the so-manieth time."""

    def spoil(rank: int) -> None:
        kind: Any = Loop if what == "_step" else StateFolder
        real, left = getattr(kind, what), [number]

        def counted(self: Any, *values: Any, **named: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, *values, **named)

        setattr(kind, what, counted)

    return spoil


def main(path: str, kind: str, ranks: int) -> dict[str, Any]:
    folder = Path(path)
    teacher = make_teacher(folder / "teacher")
    single = three(kind, folder / "alone", teacher, save_every=3)
    ends = [wait(start(alone(run, name), ranks)) for name, run in single.items()]
    several = three(kind, folder / "several", teacher, save_every=3)
    places = [(2, "_step"), (9, "_step"), (3, "save"), (2, "save_best"), (4, "_step")]
    kills = [
        wait(start(several, ranks, killed_at(*place), _several))
        for place in places
        if ranks == 1 or place[1] == "_step"
    ]
    last = wait(start(several, ranks, None, _several))
    found = {
        name: differences(alone(single[name], name).output_dir, alone(several[name], name).output_dir)
        for name in single
    }
    return {"ends": ends, "kills": kills, "last": last, "differences": found}
