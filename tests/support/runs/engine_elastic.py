"""Runs that go on with another number of processes: forks a process a rank, and writes down what each batch was.

`scenarios.py` calls `main` in a process that has only imported, so that it can fork.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from graftvit.transfer.config import RunConfig
from graftvit.transfer.data import loaders
from graftvit.transfer.data.loading import Batch, TrainBatches
from graftvit.transfer.data.sampler import BatchRequest
from graftvit.transfer.engine.loop import Loop
from PIL import Image
from support.runs.engine_killer import Spoil, start, wait
from support.runs.engine_runs import config, make_teacher, records, state
from torch.utils.data import IterableDataset

Batches = dict[int, list[list[Any]]]
"""Step -> its batches: place in the epoch, samples, sums of pixels and targets after mixing, learning rate."""


def spoiled(folder: Path, end: int | None, number: int) -> Spoil:
    """Writes down each batch as it is used, and sends itself `number` once `end` steps are done."""

    def spoil(rank: int) -> None:
        backward, step, make = Loop._backward, Loop._step, TrainBatches.__getitem__
        asked: list[BatchRequest] = []

        def recorded_make(self: TrainBatches, request: BatchRequest) -> Batch:
            asked.append(request)
            return make(self, request)

        def recorded_backward(self: Loop, batch: Any, index: int) -> None:
            backward(self, batch, index)
            images, targets = batch
            request = asked.pop(0)
            place = [request.position, self._place(index), list(request.indices)]
            sums = [float(images.double().sum()), float(targets.double().square().sum())]
            row = [self.position.step, place, sums, self.run_state.optimizer.param_groups[-1]["lr"]]
            with (folder / f"batches{rank}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

        def ended_step(self: Loop, batches: Any) -> None:
            last = rank == self.accelerator.num_processes - 1  # a request to stop need not reach all
            if self.position.step == end and (number == signal.SIGKILL or last):
                os.kill(os.getpid(), number)
            step(self, batches)

        TrainBatches.__getitem__ = recorded_make  # type: ignore[method-assign]
        Loop._backward = recorded_backward  # type: ignore[method-assign]
        Loop._step = ended_step  # type: ignore[method-assign]

    folder.mkdir(parents=True, exist_ok=True)
    return spoil


def attempt(run: RunConfig, ranks: int, end: int | None = None, number: int = signal.SIGTERM) -> list[int]:
    """The exit codes of one attempt of `run`; its batches are under `attempts/`, by the order of attempts."""
    done = run.output_dir.with_name(run.output_dir.name + "_attempts")
    count = len(list(done.glob("*"))) if done.exists() else 0
    return wait(start(run, ranks, spoiled(done / str(count), end, number)))


def batches(run: RunConfig) -> Batches:
    """What each step that counts has seen, in the order of the places: of a step done twice, the later."""
    seen: Batches = {}
    done = run.output_dir.with_name(run.output_dir.name + "_attempts")
    for folder in sorted(done.iterdir()):
        rows = [json.loads(line) for path in folder.iterdir() for line in path.read_text().splitlines()]
        own: Batches = {}
        for step, *row in rows:
            own.setdefault(step, []).append(row)
        seen |= {step: sorted(rows) for step, rows in own.items()}
    return seen


def gap(one: Path, other: Path) -> float:
    """Largest difference of a weight, average or slot, relative to the largest entry of its tensor."""
    first, second = state(one), state(other)
    named = [name for name in first if not name.startswith("meters")]
    if set(named) != {name for name in second if not name.startswith("meters")}:
        return torch.inf
    return max(
        float((first[name] - second[name]).abs().max() / first[name].abs().max().clamp(min=1e-6))
        for name in named
    )


def log_gap(one: Path, other: Path) -> float:
    """Largest relative difference of a number in the log; infinite where the records are not of the same steps."""
    first, second = records(one), records(other)
    if [record.keys() for record in first] != [record.keys() for record in second]:
        return torch.inf
    pairs = [(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a]
    return max(abs(a - b) / max(abs(a), 1e-6) for a, b in pairs)


class Stream(IterableDataset[Any]):
    """110 images in an order of their own, of which each process reads its share, as timm's streams do it."""

    def __init__(self) -> None:
        self.rank, self.world = (
            int(os.environ.get(name, value)) for name, value in (("RANK", 0), ("WORLD_SIZE", 1))
        )

    def __len__(self) -> int:
        return -(-110 // self.world)

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for number in range(self.rank, 110, self.world):
            yield Image.new("L", (8, 8), 2 * number), number % 10


def streamed(folder: Path) -> dict[str, Any]:
    """A run on a stream that is stopped in the middle of an epoch and then at its last step.

    Shares of 28 images are 7 steps for 4 processes; those of 55 would be 6 for 2, which begin theirs again instead.
    """
    loaders.open_dataset = lambda *_, **__: Stream()
    data = {"num_classes": 10, "batch_size": 4, "train_samples": None}
    run = config(folder / "run", None, data=data, optim={"epochs": 3})

    def part(ranks: int, end: int | None = None) -> list[int]:
        def spoil(rank: int) -> None:
            step = Loop._step

            def ended(self: Loop, batches: Any) -> None:
                if self.position.step == end:
                    os.kill(os.getpid(), signal.SIGTERM)
                step(self, batches)

            Loop._step = ended  # type: ignore[method-assign]

        return wait(start(run, ranks, spoil))

    ends = [part(4, 1), part(2)]
    text = (run.output_dir / "error0.txt").read_text()
    ends += [part(4, 5), part(2)]
    steps = [record["step"] for record in records(run.output_dir) if "n_parameters" in record]
    return {"ends": ends, "text": text, "steps": steps}


def main(scenario: str, path: str, wrap: str) -> dict[str, Any]:
    folder = Path(path)
    if scenario == "streamed":
        return streamed(folder)
    teacher = make_teacher(folder / "teacher")

    def run(name: str, **optim: Any) -> RunConfig:
        engine = {"save_every": 5, "fsdp": wrap == "fsdp"}
        data = {"batch_size": 4, "mixup": 0.8}
        base = {"opt": "sgd", "lr": 0.05, "accum_iter": 2}
        base |= {} if "max_steps" in optim else {"epochs": 4}
        return config(folder / name, teacher, engine=engine, data=data, optim={**base, **optim})

    ends: list[list[int]] = []
    if scenario == "back_and_forth":
        ends.append(attempt(run("whole"), 4))
        ends.append(attempt(run("cut"), 4, 7, signal.SIGKILL))
        ends.append(attempt(run("cut"), 2, 9))
        ends.append(attempt(run("cut"), 4))
    elif scenario == "from_one":
        ends.append(attempt(run("whole", accum_iter=4), 1))
        ends.append(attempt(run("cut", accum_iter=4), 1, 7, signal.SIGKILL))
        ends.append(attempt(run("cut", accum_iter=4), 2, 11))
        ends.append(attempt(run("cut", accum_iter=1), 4))  # as the setting would be for four
    else:
        texts = []
        ends.append(attempt(run("cut", max_steps=3, accum_iter=1), 2))
        for ranks, accum in ((3, 1), (1, 3)):
            ends.append(attempt(run("cut", accum_iter=accum), ranks))
            texts.append([(run("cut").output_dir / f"error{rank}.txt").read_text() for rank in range(ranks)])
        return {"ends": ends, "texts": texts}
    whole, cut = run("whole"), run("cut")
    return {
        "ends": ends,
        "steps": len(batches(whole)),
        "places": all(row[0][0] == row[0][1] for rows in batches(whole).values() for row in rows),
        "same_batches": batches(whole) == batches(cut),
        "gap": gap(whole.output_dir, cut.output_dir),
        "log_gap": log_gap(whole.output_dir, cut.output_dir),
    }
