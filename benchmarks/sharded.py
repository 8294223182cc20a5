"""What sharded teachers, students and states take, by ranks of gloo on this machine: `python -m benchmarks.sharded`.

Four ranks stand for two nodes of two. They load and shard a teacher, make students, fresh and from a file, and write
one. They take steps, and save the state of a sharded student: at once in the first rank's file, at once in a file of
each rank, and beside the training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.state import StateFolder, TrainingState
from graftvit.checkpoints.state_shards import Saving, ShardWriter
from graftvit.checkpoints.student import write_student
from graftvit.models.small import without_memory
from graftvit.transfer.analysis.report.tables import Table
from graftvit.transfer.config import DataConfig, EngineConfig, RunConfig, StudentConfig, TeacherConfig
from graftvit.transfer.engine.build import Parts, build, load_teacher, outline_teachers
from graftvit.transfer.engine.parallel import (
    PROCESSES,
    gather_each,
    gathered,
    local,
    mesh_of_nodes,
    read_once,
    receive,
    student_mesh,
)
from graftvit.transfer.engine.run_state import collect_optimizer, collect_weights
from graftvit.transfer.engine.shard_teachers import Spread, shard_units
from graftvit.transfer.engine.weight_rows import find_student_mesh, shard
from torch import Tensor, multiprocessing, nn
from torch.profiler import ProfilerActivity, profile

ARCHITECTURE = "vit_small_patch16_224"
NODES = 2
MIB = 2**20
RENAMED = hasattr(dist, "all_gather_single")
TEACHER = "teacher in a node, at load"
COLLECTIVES = {
    "gather weights": "all_gather_single" if RENAMED else "all_gather_into_tensor",
    "reduce and scatter gradients": "reduce_scatter_single" if RENAMED else "reduce_scatter_tensor",
    "average gradients": "all_reduce",
}
"""What FSDP2 calls, in this version of torch."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.sharded", description=__doc__)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--saves", type=int, default=5)
    given = parser.parse_args()
    sizes = {
        "embed_dim": given.width,
        "depth": given.depth,
        "num_heads": 8,
        "num_classes": 10,
        "img_size": 64,
    }
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        model = timm.create_model(ARCHITECTURE, **sizes)
        spec = Preprocessing.of(model)
        teacher = Path(folder) / "teacher"
        write_student(model, teacher, architecture=ARCHITECTURE, model_args=sizes, preprocessing=spec)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        multiprocessing.spawn(work, (Path(folder), sizes, port, given.ranks, given.saves), given.ranks)
        report(folder, sum(parameter.nbytes for parameter in model.parameters()), given.ranks)


def report(folder: str, size: int, ranks: int) -> None:
    """Print the tables of what the ranks have written down."""
    found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    rows = []
    for what in found[0]["peaks"]:
        peak = max(own["peaks"][what] for own in found)
        share = size / (ranks // NODES if what == TEACHER else ranks)
        rows.append((what, f"{share / MIB:.1f}", f"{peak / MIB:.1f}", f"{peak / share:.3f}"))
    print(f"models of {size / MIB:.1f} MiB, and the largest tensor of {found[0]['largest'] / MIB:.1f} MiB")
    print(Table(("model", "share, MiB", "most memory of a rank, MiB", "of the share"), rows).to_markdown())
    groups = sorted({(kind, group) for own in found for kind, group in own["groups"]})
    steps = [
        (kind, group, max(own["groups"].count([kind, group]) for own in found)) for kind, group in groups
    ]
    print(Table(("in a step", "between the ranks", "calls of each"), steps).to_markdown())
    stalls = {way: max(own["stalls"][way] for own in found) for way in found[0]["stalls"]}
    rows = [(way, f"{stall:.2f}", f"{stall / max(stalls.values()):.3f}") for way, stall in stalls.items()]
    print(f"\na state of {found[0]['state'] / MIB:.0f} MiB")
    print(Table(("saved", "training waits, s", "of the longest"), rows).to_markdown())


def work(rank: int, folder: Path, sizes: dict[str, Any], port: int, ranks: int, saves: int) -> None:
    """Measure on one rank, and write down what was found."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank % (ranks // NODES)),
        "LOCAL_WORLD_SIZE": str(ranks // NODES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    accelerator = Accelerator(cpu=True)
    group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
    peaks: dict[str, int] = {}
    with measured_memory(folder / "teacher") as peak:
        teacher = load_sharded(folder / "teacher", accelerator, group)
    peaks[TEACHER] = peak[0]
    for what, source in {"fresh student": None, "student from a file": folder / "teacher"}.items():
        with measured_memory(folder / "teacher") as peak:
            parts = make_student(source, folder / "run", sizes, accelerator, group)
        peaks[f"{what}, at load"] = peak[0]
    with measured_memory(folder / "student") as peak:
        write(parts, folder / "student", writes=rank == 0)
    own = sum(local(parameter).nbytes for parameter in parts.task.parameters())
    peaks["student, at export"] = own + peak[0]
    torch.manual_seed(0)
    student = timm.create_model(ARCHITECTURE, **sizes)
    shard_student(student, accelerator, group)
    optimizer = torch.optim.AdamW(student.parameters())
    with counted() as groups:
        step(student, teacher, optimizer)
    step(student, teacher, optimizer)
    slots, counters, _ = collect_optimizer(student, optimizer)
    tensors = {**collect_weights(student, None), **slots, **counters}
    found = {
        "peaks": peaks,
        "largest": max(parameter.nbytes for parameter in parts.task.parameters()),
        "groups": groups,
        "state": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        "stalls": time_saves(tensors, folder, group, saves),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def load_sharded(path: Path, accelerator: Accelerator, group: dist.ProcessGroup) -> nn.Module:
    """Load a teacher as a run does, and shard it within the node."""
    how = TeacherConfig(source=str(path), shard=True)
    loaded = read_once(lambda: {"": load_teacher(how, None)}, group, outline_teachers)[""]
    spread = Spread(mesh_of_nodes(accelerator, group, "cpu")[PROCESSES], group, loaded.report.places)
    names = {module: name for name, module in loaded.model.named_modules()}
    for unit in shard_units(loaded.model):
        spread.shard(unit, f"{names[unit]}.")
    receive(loaded.model, group)
    return loaded.model


def make_student(
    source: Path | None, run: Path, sizes: dict[str, Any], accelerator: Accelerator, group: dist.ProcessGroup
) -> Parts:
    """Make a student as a run does, with fresh weights or those of `source`, and shard it over all ranks."""
    arguments = {key: value for key, value in sizes.items() if key != "num_classes"}
    fresh: dict[str, Any] = {"model": ARCHITECTURE, "model_args": arguments}
    config = RunConfig(
        mode="scratch" if source is None else "finetune",
        output_dir=run,
        teacher=TeacherConfig(source=None if source is None else f"local-dir:{source}"),
        student=StudentConfig(**({} if source is not None else fresh)),
        data=DataConfig(dataset="digits", batch_size=2, workers=0),
        engine=EngineConfig(fsdp=True, device="cpu"),
    )
    mesh = find_student_mesh(config, accelerator, group)
    parts = build(config, rank=dist.get_rank(), world_size=dist.get_world_size(), group=group, mesh=mesh)
    shard(parts.task, parts.task.shard_units, student_mesh(config.engine, accelerator, group, "cpu"))
    return parts


def write(parts: Parts, folder: Path, *, writes: bool) -> None:
    """Write a sharded student as a run does at its end."""
    plan = parts.plan
    with without_memory():
        model = plan.create()
    values = slowly(gather_each(parts.task.trainable.state_dict(), keep=True))
    if writes:
        described = {"architecture": plan.architecture, "model_args": plan.arguments}
        write_student(model, folder, preprocessing=plan.preprocessing, values=values, **described)
    deque(values, maxlen=0)


def slowly(values: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield gathered tensors after gloo's threads have let go of them: what these free, the profiler does not see."""
    for item in values:
        time.sleep(0.005)
        yield item
        del item


def shard_student(student: nn.Module, accelerator: Accelerator, group: dist.ProcessGroup) -> None:
    student.predict = student.forward  # type: ignore[assignment]
    shard(student, shard_units(student), mesh_of_nodes(accelerator, group, "cpu"))


def step(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = teacher(images)
    (student(images) - wanted).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def measured_memory(files: Path) -> Iterator[list[int]]:
    """Give the most bytes that torch takes within the block; those of mapped files are on the disk."""
    sizes = {path.stat().st_size for path in files.glob("*.safetensors")}
    peak: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield peak
    events = [
        each.nbytes() for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"
    ]
    peak.append(max(itertools.accumulate(nbytes for nbytes in events if abs(nbytes) not in sizes)))


@contextmanager
def counted() -> Iterator[list[tuple[str, str]]]:
    """Give the kinds of the collectives within the block, with the ranks that take part in each."""
    calls: list[tuple[str, str]] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES.values()}

    def call(kind: str, original: Callable[..., Any], *given: Any, group: Any = None, **named: Any) -> Any:
        calls.append((kind, " ".join(map(str, dist.get_process_group_ranks(group)))))
        return original(*given, group=group, **named)

    for kind, name in COLLECTIVES.items():
        setattr(dist, name, partial(call, kind, originals[name]))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def time_saves(
    tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup, saves: int
) -> dict[str, float]:
    """Return the median seconds that a rank waits for a save of each kind."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    background = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
    times: dict[str, list[float]] = {
        "in one file": [],
        "in a file of each rank": [],
        "beside the training": [],
    }
    copies: dict[str, Tensor] = {}
    meta: dict[str, Any] = {"config": {}, "position": {"step": 0}}
    one, several = StateFolder(folder / "one"), StateFolder(folder / "several")
    (folder / "one").mkdir(exist_ok=True)
    for _ in range(saves):
        dist.barrier(group)
        began = time.perf_counter()
        whole = gathered(tensors, keep=rank == 0)
        if rank == 0:
            one.save(TrainingState(whole, {}))
        dist.barrier(group)
        times["in one file"].append(time.perf_counter() - began)
        began = time.perf_counter()
        commit = partial(several.commit, last=True, best=False)
        writer = ShardWriter(tensors, several.incoming, meta, commit, rank, ranks, copies)
        saving = Saving(writer, background)
        times["beside the training"].append(time.perf_counter() - began)
        saving.wait()
        times["in a file of each rank"].append(time.perf_counter() - began)
    return {way: median(found) for way, found in times.items()}


if __name__ == "__main__":
    main()
