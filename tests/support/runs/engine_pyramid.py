"""Runs in which one pyramid learns from another on one process and on two, replicated and sharded.

`scenarios.py` calls `main` in a process that has only imported, so that it can fork.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftvit.checkpoints.pretrained import load
from graftvit.models.conversion import plan_of
from support.models.pyramids import TINY, write_pyramid
from support.runs.engine_elastic import gap, log_gap
from support.runs.engine_killer import start, wait
from support.runs.engine_runs import config


def main(
    folder: str, teacher: str, student: str, transfer: dict[str, Any], converted: dict[str, Any]
) -> dict[str, Any]:
    """Train the same global batches three times, and return the exit codes and the gaps to the run of one process.

    `converted` holds what a student that starts as a conversion needs: `plan`, `init`, `without`.

    By SGD: the gradient of a key bias is zero, and Adam would magnify its rounding.
    """
    root = Path(folder)
    write_pyramid(root / "teacher", teacher)

    def trained(name: str, ranks: int, fsdp: bool = False) -> list[int]:
        run = config(
            root / name, root / "teacher",
            student={
                "model": TINY[student][0], "model_args": TINY[student][1], "img_size": 32, "drop_path": 0.0,
                **converted,
            },
            transfer=transfer,
            data={"batch_size": 8 // ranks, "train_samples": 40, "mixup": 0.0},
            optim={"max_steps": 4, "warmup_epochs": 0, "opt": "sgd", "lr": 0.01},
            engine={"fsdp": fsdp},
        )  # fmt: skip
        return wait(start(run, ranks))

    ends = [trained("one", 1), trained("ddp", 2), trained("fsdp", 2, fsdp=True)]
    gaps = [
        max(gap(root / "one", root / name), log_gap(root / "one", root / name)) for name in ("ddp", "fsdp")
    ]
    plans = [plan_of(load(root / name / "student")) for name in ("one", "ddp", "fsdp")]
    return {"ends": ends, "gaps": gaps, "plans": [None if plan is None else str(plan) for plan in plans]}
