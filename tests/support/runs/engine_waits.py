"""Two DDP processes of which the second is slow in every batch, and what their log says.

`scenarios.py` calls `main` in a process that has only imported, so that it can fork.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from graftvit.checkpoints.files import read_records
from graftvit.transfer.engine.loop import Loop
from support.runs.engine_killer import start, wait
from support.runs.engine_runs import config


def main(path: str, seconds: float) -> dict[str, Any]:
    folder = Path(path)

    def slow(rank: int) -> None:
        backward = Loop._backward

        def delayed(self: Loop, batch: Any, index: int) -> None:
            time.sleep(seconds * rank)
            backward(self, batch, index)

        Loop._backward = delayed  # type: ignore[method-assign]

    run = config(folder, engine={"log_interval": 2}, optim={"accum_iter": 2, "epochs": 3, "clip_grad": None})
    ends = wait(start(run, 2, slow))
    return {"ends": ends, "log": read_records(folder / "log.jsonl")}
