"""Two DDP processes of which the second is slow in every batch: `python engine_waits.py FOLDER SECONDS` prints the log.

A script, so that it forks from a process that has only imported.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from engine_killer import start, wait
from engine_runs import config
from graftvit.transfer.engine.loop import Loop
from graftvit.transfer.engine.runlog import read_log
from torch import Tensor


def main(folder: Path, seconds: float) -> None:
    def slow(rank: int) -> None:
        backward = Loop._backward

        def delayed(self: Loop, images: Tensor, targets: Tensor, index: int) -> None:
            time.sleep(seconds * rank)
            backward(self, images, targets, index)

        Loop._backward = delayed  # type: ignore[method-assign]

    run = config(folder, engine={"log_interval": 2}, optim={"accum_iter": 2, "epochs": 3, "clip_grad": None})
    ends = wait(start(run, 2, slow))
    sys.stdout.write(json.dumps({"ends": ends, "log": read_log(folder / "log.jsonl")}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
