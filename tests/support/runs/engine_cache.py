"""Runs that fill one cache of teacher targets: killed in the middle, side by side, on two ranks.

`scenarios.py` calls `main` in a process that has only imported, so that it can fork.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from graftvit.transfer.config import RunConfig
from graftvit.transfer.data import loaders
from graftvit.transfer.methods.dual import DualViT
from support.runs.engine_killer import Spoil, start, wait
from support.runs.engine_runs import config, differences, make_teacher
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def counted(folder: Path, end: int | None = None, times: int = 1) -> Spoil:
    """Writes down each batch that a teacher sees, and kills itself before it sees batch `end`."""

    def spoil(rank: int) -> None:
        loaders.RANGE = 24  # 130 images are six files
        real, seen = DualViT.teach, [0]

        def teach(self: DualViT, images: Tensor) -> dict[str, Tensor]:
            if isinstance(images, FakeTensor):
                return real(self, images)
            if seen[0] == end:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1
            with (folder / f"seen{os.getpid()}").open("a") as file:
                file.write(f"{len(images)}\n")
            return real(self, images)

        DualViT.teach = teach  # type: ignore[method-assign]

    folder.mkdir(parents=True, exist_ok=True)
    return spoil


def passes(folder: Path) -> int:
    """The number of batches that teachers have seen."""
    return sum(path.read_text().count("\n") for path in folder.glob("seen*"))


def main(scenario: str, path: str) -> dict[str, Any]:
    folder = Path(path)
    teacher = make_teacher(folder / "teacher")
    ranks = 2 if scenario == "ranks" else 1

    def run(name: str, cache: bool = True) -> RunConfig:
        transfer = {"method": "logits", **({"cache": str(folder / "cache")} if cache else {})}
        data = {
            "mixup": 0.0,
            "views": 2,
            "batch_size": 16 // ranks,
            "workers": 1 if scenario == "workers" else 0,
        }
        return config(folder / name, teacher, transfer=transfer, data=data)

    report: dict[str, Any] = {"ends": [wait(start(run("without", cache=False), ranks))]}
    if scenario == "killed":
        for end in (3, 5):
            report["ends"].append(wait(start(run("one"), 1, counted(folder / "killed", end))))
        report["kept"] = len(list((folder / "cache").rglob("shard-*")))
    if scenario == "beside":
        children = [start(run(name), 1, counted(folder / name)) for name in ("one", "other")]
        report["ends"] += [wait(each) for each in children]
        report["both"] = passes(folder / "one") + passes(folder / "other")
        report["other"] = differences(run("without").output_dir, run("other").output_dir)
    report["ends"].append(wait(start(run("one"), ranks, counted(folder / "first"))))
    report["ends"].append(wait(start(run("two"), ranks, counted(folder / "second"))))
    report["passes"] = [passes(folder / name) for name in ("first", "second")]
    report["left"] = [str(each) for each in (folder / "cache").rglob(".*")]
    names = {name: differences(run("without").output_dir, run(name).output_dir) for name in ("one", "two")}
    return {**report, "differences": names}
