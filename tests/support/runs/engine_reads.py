"""Starts of eight ranks: what each process opens, how much memory it takes, and how it ends if the reader fails.

`scenarios.py` calls `main` in a process that has only imported, so that it can fork.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from graftvit.checkpoints import weight_files
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.loop import Loop
from safetensors.torch import load_file, save_file
from support.runs.engine_killer import Spoil, start, wait
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, config, make_teacher, tiny_vit

RANKS = 8
LARGE = {"embed_dim": 512, "depth": 16}
"""A teacher of 200 MB, in blocks of 13."""


def make(folder: Path, **size: int) -> Path:
    """Write a plain timm folder with random weights."""
    model = tiny_vit(**size)
    spec = Preprocessing.of(model, mean=(0.5,), std=(0.5,))
    arguments = {**ARGUMENTS, **size, "num_classes": 10}
    write_student(model, folder, architecture=ARCHITECTURE, model_args=arguments, preprocessing=spec)
    return folder


def shared(ranks: int) -> dict[str, Any]:
    """Return the sections of the same batch of 16 for one process or for all ranks."""
    return {"data": {"batch_size": 16 // RANKS}, "optim": {"accum_iter": RANKS // ranks}}


def sharded(folder: Path, teacher: Path, *, ranks: int, **student: int) -> RunConfig:
    """Return a run whose teacher and student are sharded if it has several ranks."""
    several = ranks > 1
    return config(
        folder,
        mode="transfer",
        teacher={"source": f"local-dir:{teacher}", "shard": several},
        student={"model_args": {**ARGUMENTS, **student}},
        transfer={"layers": "0"},
        **shared(ranks),
        engine={"fsdp": several, "save_every": 1, "evaluate_teacher": False},
    )


def leave_after_a_step(rank: int) -> None:
    """End the process when the state of the first step is on the disk."""
    step = Loop._step

    def ended(self: Loop, batches: Any) -> None:
        if self.position.step == 1:
            os._exit(0)
        step(self, batches)

    Loop._step = ended  # type: ignore[method-assign]


def _peak() -> int:
    """Return the most bytes of memory that this process has had at once."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def measured(folder: Path) -> Spoil:
    """Write down what a process opened and its peak of memory until the first step; then end it."""

    def spoil(rank: int) -> None:
        opened: list[str] = []
        real: Any = weight_files.safe_open

        def safe_open(path: Any, *arguments: Any, **keywords: Any) -> Any:
            opened.append(str(path))  # a library in Rust opens it, which no audit sees
            return real(path, *arguments, **keywords)

        weight_files.safe_open = safe_open
        sys.addaudithook(lambda event, found: opened.append(str(found[0])) if event == "open" else None)

        def run(self: Loop) -> None:
            files = sorted({path for path in opened if path.endswith(".safetensors")})
            (folder / f"{rank}.json").write_text(json.dumps({"peak": _peak(), "opened": files}))
            dist.barrier()
            os._exit(0)

        Loop.run = run  # type: ignore[assignment, method-assign]
        Path("/proc/self/clear_refs").write_text("5")

    folder.mkdir()
    return spoil


def started(run: RunConfig, folder: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """Start a run of eight ranks; return their exit codes, and what each opened and its peak."""
    ends = wait(start(run, RANKS, measured(folder)))
    return ends, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def starts(folder: Path) -> dict[str, Any]:
    """Start a run with small models, one with large ones, and one that resumes; the difference is their weights."""
    small, large = make(folder / "small-teacher"), make(folder / "large-teacher", **LARGE)
    student = {"embed_dim": 256, "depth": 16}
    runs = {
        "small": sharded(folder / "small", small, ranks=RANKS, depth=16),
        "new": sharded(folder / "new", large, ranks=RANKS, **student),
        "resumed": sharded(folder / "resumed", large, ranks=RANKS, **student),
    }
    before = wait(start(sharded(folder / "resumed", large, ranks=1, **student), 1, leave_after_a_step))
    state = folder / "resumed" / "checkpoints" / "last.safetensors"
    sizes = {path.name: path.stat().st_size for path in (large / "model.safetensors", state)}
    found = {name: started(run, folder / f"{name}-found") for name, run in runs.items()}
    return {"before": before, "sizes": sizes, "found": found}


def failures(folder: Path) -> dict[str, Any]:
    """Start runs of three ranks with files that cannot be read, by what is wrong with them."""
    found = {}
    for kind in ("missing", "short", "keys", "state"):
        teacher = make_teacher(folder / kind / "teacher")
        run = config(folder / kind / "run", teacher, engine={"save_every": 1})
        weights = teacher / "model.safetensors"
        run.output_dir.mkdir()
        (run.output_dir / "kept").touch()  # or a run that did nothing removes its folder
        if kind == "missing":
            weights.unlink()
        elif kind == "short":
            os.truncate(weights, weights.stat().st_size // 2)
        elif kind == "keys":
            tensors = load_file(weights)
            del tensors["blocks.0.attn.qkv.weight"]
            save_file(tensors, weights)
        else:
            assert wait(start(run, 1, leave_after_a_step)) == [0]
            for state in (run.output_dir / "checkpoints").iterdir():
                os.truncate(state, state.stat().st_size // 2)
        ends = wait(start(run, 3))
        texts = [(run.output_dir / f"error{rank}.txt").read_text() for rank in range(3)]
        found[kind] = {"ends": ends, "texts": texts}
    return {"found": found}


def killed(folder: Path) -> dict[str, Any]:
    """Start a run whose reader is killed after some tensors of the teacher, and one while the state is sent."""

    def spoil_after(count: int) -> Spoil:
        def spoil(rank: int) -> None:
            real, sent = dist.broadcast, [0]

            def broadcast(tensor: Any, *arguments: Any, **keywords: Any) -> Any:
                sent[0] += tensor.dim() == 1 and tensor.numel() > 1000
                if rank == 0 and sent[0] > count:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(tensor, *arguments, **keywords)

            dist.broadcast = broadcast

        return spoil

    teacher = make_teacher(folder / "teacher")

    def run(ranks: int) -> RunConfig:
        return config(folder / "run", teacher, engine={"save_every": 1}, **shared(ranks))

    ends = [wait(start(run(RANKS), RANKS, spoil_after(4)))]
    assert wait(start(run(1), 1, leave_after_a_step)) == [0]
    ends.append(wait(start(run(RANKS), RANKS, spoil_after(25))))
    return {"ends": ends, "last": wait(start(run(1), 1))}


def main(scenario: str, path: str) -> dict[str, Any]:
    return {"starts": starts, "failures": failures, "killed": killed}[scenario](Path(path))
