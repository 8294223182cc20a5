"""Runs that are killed, stopped, poisoned or starved of disk: forks a process a rank and looks at how they end.

`scenarios.py` calls `main` in a process that has only imported, so that it can fork.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from graftvit.models.errors import GraftError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine import run_state
from graftvit.transfer.engine.loop import Loop
from graftvit.transfer.engine.run_state import RunState
from graftvit.transfer.engine.train import RunResult, train
from graftvit.transfer.methods.dual import DualOutput, DualViT
from graftvit.transfer.verdict import read_verdict
from support.hub.ports import free_ports
from support.runs.dense_runs import run as dense_run
from support.runs.dense_runs import small_coco
from support.runs.engine_runs import config, differences, make_convnext, make_teacher, several_losses, state
from support.runs.patience import until

STOPPED = 100
Spoil = Callable[[int], None]


def start(
    run: Any, ranks: int, spoil: Spoil | None = None, train: Callable[[Any], RunResult] = train
) -> list[int]:
    """Forks the processes of one attempt; `spoil(rank)` is called in each, before it trains."""
    (port,) = free_ports(1)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            if ranks > 1:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            work(run, rank, spoil, train)
        children.append(child)
    return children


def work(run: Any, rank: int, spoil: Spoil | None, train: Callable[[Any], RunResult]) -> None:
    """One process of an attempt; its exit code says how it went."""
    code = 99
    try:
        if spoil is not None:
            spoil(rank)
        result = train(run)
        code = 0 if result.finished else STOPPED + (result.signal or 0)
    except GraftError as error:
        code = error.exit_code
        (run.output_dir / f"error{rank}.txt").write_text(str(error))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def lines(run: RunConfig) -> int:
    path = run.output_dir / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def disturb(run: RunConfig, children: list[int], target: int, number: int, pause: float) -> None:
    """Sends `number` to the processes (a stop signal to the last one only) once the log has `target` lines."""
    try:
        until(lambda: lines(run) >= target, f"{target} records", every=0.001)
        time.sleep(pause)
    finally:
        for child in children if number == signal.SIGKILL else children[-1:]:
            os.kill(child, number)


def interrupted(scenario: str, run: Callable[..., RunConfig], ranks: int, most: int = 10) -> dict[str, Any]:
    """Kills (or terminates) a run again and again and compares it with an undisturbed one."""
    assert wait(start(run("whole"), ranks)) == [0] * ranks, "the undisturbed run failed"
    kills = scenario == "kill"
    total, times = lines(run("whole")), (most if ranks == 1 else 4) if kills else 2
    number = signal.SIGKILL if kills else signal.SIGTERM
    expected = -signal.SIGKILL if kills else STOPPED + signal.SIGTERM
    ends, chance = [], random.Random()
    for attempt in range(times):
        children = start(run("cut"), ranks)
        disturb(run("cut"), children, 1 + attempt * (total - 4) // times, number, chance.uniform(0, 0.05))
        ends.append(wait(children))
    return {
        "disturbed": sum(end == [expected] * ranks for end in ends),
        "ends": ends,
        "last": wait(start(run("cut"), ranks)),
        "differences": differences(run("whole").output_dir, run("cut").output_dir),
        "verdicts": [verdict_of(run(name).output_dir) for name in ("whole", "cut")],
    }


def verdict_of(folder: Path) -> dict[str, Any] | None:
    """The verdict of a run without its own number; None where it was asked for none."""
    found = read_verdict(folder)
    return None if found is None else found.model_dump(exclude={"run_id"})


def poison(rank: int) -> None:
    """On rank 1 alone, the part layer01 is NaN from the seventh training batch on."""
    real, calls = DualViT.forward, [0]

    def forward(self: DualViT, images: torch.Tensor) -> DualOutput:
        output = real(self, images)
        calls[0] += self.training
        if rank == 1 and self.training and calls[0] >= 7:
            output.parts["layer01"] = output.parts["layer01"] * torch.nan
            output.transfer_loss = output.transfer_loss * torch.nan
        return output

    DualViT.forward = forward  # type: ignore[method-assign]


def starve(rank: int) -> None:
    """On rank 0, which writes, no file may grow beyond 20 kB after the fourth step."""
    real = Loop._step

    def step(self: Loop, batches: Any) -> None:
        real(self, batches)
        if rank == 0 and self.position.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    Loop._step = step  # type: ignore[method-assign]


def failed(spoil: Spoil, run: Callable[..., RunConfig], ranks: int) -> dict[str, Any]:
    """How a run ends that `spoil` makes fail, and whether it goes on afterwards."""
    ends = wait(start(run("cut"), ranks, spoil))
    texts = [(run("cut").output_dir / f"error{rank}.txt").read_text() for rank in range(ranks)]
    finite = all(t.isfinite().all() for t in state(run("cut").output_dir).values() if t.is_floating_point())
    return {"ends": ends, "texts": texts, "finite": finite, "last": wait(start(run("cut"), ranks))}


def clocked(run: Callable[..., RunConfig], ranks: int) -> dict[str, Any]:
    """A run that saves by clocks which go at different speeds in its processes, is killed and goes on."""
    folder = run("cut").output_dir.parent

    def spoil(rank: int) -> None:
        minutes = [0]
        real, save = Loop._step, RunState.save

        def step(self: Loop, batches: Any) -> None:
            if self.position.step == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, batches)
            minutes[0] += 1 + rank

        def noted(self: RunState, position: Any, *, best: bool = False, last: bool = True) -> None:
            save(self, position, best=best, last=last)
            with (folder / f"saved{rank}").open("a") as file:
                file.write(f"{position.step}\n")

        run_state.now = lambda: 60.0 * minutes[0]
        Loop._step, RunState.save = step, noted  # type: ignore[method-assign]

    engine = run("cut").engine.model_copy(update={"save_every": None, "save_minutes": 2})
    cut = run("cut").model_copy(update={"engine": engine})
    ends = [wait(start(run("whole"), ranks)), wait(start(cut, ranks, spoil)), wait(start(cut, ranks))]
    saved = [(folder / f"saved{rank}").read_text().split() for rank in range(ranks)]
    return {"ends": ends, "saved": saved, "differences": differences(run("whole").output_dir, cut.output_dir)}


def rewrapped(run: Callable[..., RunConfig], ranks: int) -> dict[str, Any]:
    """A run that is stopped under DDP and goes on under FSDP2, against DDP to the end."""
    assert wait(start(run("whole"), ranks)) == [0] * ranks, "the undisturbed run failed"
    children = start(run("cut"), ranks)
    disturb(run("cut"), children, 4, signal.SIGTERM, 0)
    ends = [wait(children), wait(start(run("cut", fsdp=True), ranks))]
    whole, cut = (state(run(name).output_dir) for name in ("whole", "cut"))
    gaps = [float((whole[n] - cut[n]).abs().max()) for n in whole if n.startswith(("student.", "ema."))]
    return {"ends": ends, "same_names": whole.keys() == cut.keys(), "gap": max(gaps)}


def main(scenario: str, path: str, ranks: int, wrap: str) -> dict[str, Any]:
    folder = Path(path)
    if wrap == "dense":
        images = small_coco(folder / "coco")
        engine = {"log_interval": 1, "save_every": 3, "eval_every": 2}
        sizes = {"batch_size": 4 // ranks, "eval_batch_size": 4}
        return interrupted(
            scenario,
            lambda name: dense_run(folder / name, images, engine=engine, data=sizes, optim={"epochs": 6}),
            ranks,
            4,
        )
    teacher = make_teacher(folder / "teacher")
    several = scenario == "kill" and ranks > 1
    losses = several_losses(make_convnext(folder / "convnext")) if several else {}

    def run(name: str, fsdp: bool = wrap == "fsdp") -> RunConfig:
        engine = {"log_interval": 1, "save_every": 3, "fsdp": fsdp, "eval_every": 2}
        engine["report"] = scenario == "terminate"
        optim: dict[str, Any] = {"epochs": 6, "accum_iter": 2 if ranks > 1 and scenario != "clock" else 1}
        if scenario == "rewrap":  # Adam makes a whole step of rounding where a gradient is zero
            optim |= {"opt": "sgd", "lr": 0.05}
        return config(folder / name, teacher, engine=engine, optim=optim, **losses)

    if scenario in ("kill", "terminate"):
        return interrupted(scenario, run, ranks)
    if scenario == "clock":
        return clocked(run, ranks)
    if scenario == "rewrap":
        return rewrapped(run, ranks)
    return failed({"poison": poison, "starve": starve}[scenario], run, ranks)
