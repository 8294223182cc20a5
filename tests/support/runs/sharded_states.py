"""States of sharded runs: on other numbers of ranks, and of a rank that is killed while it writes.

`scenarios.py` calls `main` in a process that has only imported, so that it can fork.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import graftvit
import torch
from graftvit.checkpoints import state_shards
from graftvit.checkpoints.state import StateFolder, find_state, read_meta
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine import train
from graftvit.transfer.engine.loop import Loop
from graftvit.transfer.engine.parallel import local
from support.runs.engine_killer import start, wait
from support.runs.engine_runs import config, differences, make_teacher, state


def save_again(nodes: int) -> Any:
    """Save the state that a rank has read, and end; the ranks are on so many nodes."""

    def spoil(rank: int) -> None:
        if nodes > 1:
            size = int(os.environ["WORLD_SIZE"]) // nodes
            os.environ |= {"LOCAL_WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % size)}

        def run(self: Loop) -> None:
            self.run_state.save(self.position)
            self.run_state.wait()
            os._exit(0)

        Loop.run = run  # type: ignore[assignment, method-assign]

    return spoil


def ranks(folder: Path, first: int) -> dict[str, Any]:
    """A state of `first` ranks, read and written again by half as many on two nodes, and by one without shards."""
    teacher = make_teacher(folder / "teacher")

    def run(count: int, fsdp: bool | str) -> RunConfig:
        sizes = {"batch_size": 16 // first}, {"accum_iter": first // count, "max_steps": 3}
        return config(
            folder / "run", teacher, data=sizes[0], optim=sizes[1], engine={"fsdp": fsdp, "save_every": 2}
        )

    def saved() -> dict[str, torch.Tensor]:
        return {
            name: tensor for name, tensor in state(folder / "run").items() if not name.startswith("meters")
        }

    codes, kinds = [wait(start(run(first, True), first))], []
    before = saved()
    for count, fsdp in ((first // 2, "node"), (1, False)):
        codes.append(wait(start(run(count, fsdp), count, save_again(2 if count > 1 else 1))))
        kinds.append(find_state(folder / "run" / "checkpoints").name)
        again = saved()
        assert again.keys() == before.keys()
        assert all(torch.equal(again[name], before[name]) for name in before)
    names = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    return {"codes": codes, "kinds": kinds, "names": names}


def killed(folder: Path) -> dict[str, Any]:
    """A run whose second rank is killed while it writes its part of the state of step 6."""
    teacher = make_teacher(folder / "teacher")

    def run(name: str) -> RunConfig:
        return config(folder / name, teacher, engine={"fsdp": True, "save_every": 3}, optim={"epochs": 3})

    def spoil(rank: int) -> None:
        real, calls = state_shards.write_state, [0]

        def write(path: Path, own: Any) -> None:
            calls[0] += 1
            if rank == 1 and calls[0] == 2:
                path.write_bytes(b"torn")
                os.kill(os.getpid(), signal.SIGKILL)
            real(path, own)

        state_shards.write_state = write  # type: ignore[assignment]

    assert wait(start(run("whole"), 2)) == [0, 0]
    ends = wait(start(run("cut"), 2, spoil))
    checkpoints = folder / "cut" / "checkpoints"
    names = sorted(path.name.partition(".")[0] for path in checkpoints.iterdir())
    found = StateFolder(checkpoints).load()
    assert found is not None
    step = read_meta(find_state(checkpoints))["position"]["step"]
    for source in (folder / "cut", find_state(checkpoints)):
        weights = graftvit.load(source).state_dict()
        assert all(torch.equal(weights[name], state(folder / "cut")[f"student.{name}"]) for name in weights)
    last = wait(start(run("cut"), 2))
    return {
        "ends": ends, "names": names, "steps": [step, found.meta["position"]["step"]], "last": last,
        "differences": differences(folder / "whole", folder / "cut"),
    }  # fmt: skip


def made(folder: Path) -> dict[str, Any]:
    """Runs whose students are made in rows, and the same ones with students that each rank makes whole."""
    teacher, seven = make_teacher(folder / "teacher"), make_teacher(folder / "seven", 7)
    like = {"model": "auto", "model_args": {}, "img_size": 12}
    kinds: dict[str, tuple[Path, dict[str, Any]]] = {
        "fresh": (
            teacher,
            {"student": {"plan": "0: nystrom; 1: manhattan"}, "transfer": {"method": "logits"}},
        ),
        "started": (seven, {"mode": "finetune", "student": like}),  # a fresh head, and other positions
    }
    shares: dict[str, list[float]] = {}

    def run(name: str, kind: str) -> RunConfig:
        source, sections = kinds[kind]
        short = {"max_steps": 2, "warmup_epochs": 0}
        return config(folder / name, source, optim=short, engine={"fsdp": "node"}, **sections)

    def make_whole(rank: int) -> None:
        train.find_student_mesh = lambda *given: None  # type: ignore[assignment]

    def measure(rank: int) -> None:
        build = train.build

        def measured(*given: Any, **named: Any) -> Any:
            parts = build(*given, **named)
            own = list(parts.task.trainable.parameters())
            held = sum(local(each).numel() for each in own) / sum(each.numel() for each in own)
            (folder / f"share{rank}").write_text(str(held))
            return parts

        train.build = measured  # type: ignore[assignment]

    codes = []
    for kind in kinds:
        codes += wait(start(run(f"{kind}_whole", kind), 2, make_whole))
        codes += wait(start(run(f"{kind}_rows", kind), 2, measure))
        shares[kind] = [float((folder / f"share{rank}").read_text()) for rank in range(2)]
    return {
        "codes": codes, "shares": shares,
        "differences": {kind: differences(folder / f"{kind}_whole", folder / f"{kind}_rows") for kind in kinds},
    }  # fmt: skip


def main(scenario: str, path: str, *arguments: int) -> dict[str, Any]:
    return {"ranks": ranks, "killed": killed, "made": made}[scenario](Path(path), *arguments)  # type: ignore[operator, no-any-return]
