"""Runs and steps with sharded teachers: forks a process a rank. `scenarios.py` calls `main`."""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.student import write_student
from graftvit.transfer.config import RunConfig, TeacherConfig
from graftvit.transfer.engine.build import DTYPES, load_teacher, outline_teachers
from graftvit.transfer.engine.loop import Loop
from graftvit.transfer.engine.parallel import outline_of, read_once, receive
from graftvit.transfer.engine.shard_teachers import Spread, gather_to_run, shard_units
from graftvit.transfer.methods.dual import DualViT
from support.hub.ports import free_ports
from support.models.dense import images, tiny
from support.models.pyramids import TINY
from support.models.pyramids import tiny as tiny_pyramid
from support.runs.engine_elastic import gap
from support.runs.engine_killer import start, wait
from support.runs.engine_runs import (
    ARCHITECTURE,
    ARGUMENTS,
    config,
    differences,
    make_convnext,
    make_teacher,
    several_losses,
    tiny_vit,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

STEPS: list[tuple[str, list[dict[str, Any]]]] = [
    ("vit", [{"method": "distill", "layers": "0,1"}]),
    ("vit", [{"method": "attention_output", "layers": "last:1"}, {"method": "block_output", "layers": "0"}]),
    ("beit", [{"method": "distill"}, {"method": "logits"}]),
    ("eva02", [{"method": "distill_q"}, {"method": "feature", "tokens": "both"}]),
    ("dinov3", [{"method": "distill"}, {"method": "distill_v"}]),
    ("swin", [{"method": "distill", "layers": "0,1"}]),
    ("pvt", [{"method": "attention_output", "layers": "last:1"}, {"method": "logits"}]),
    ("test_convnext", [{"method": "feature", "tokens": "patches"}, {"method": "logits"}]),
]


def step_results(family: str, losses: list[dict[str, Any]]) -> dict[str, Any]:
    """One step with a whole teacher, and with a sharded one that the first rank alone has, on this rank."""
    if family.startswith("test_"):
        torch.manual_seed(1)
        teacher: Any = timm.create_model(family, num_classes=5).double().eval()
        student = tiny(seed=2, img_size=(64, 64))
        x = images(size=(64, 64))
    elif family in TINY:
        teacher, student = (tiny_pyramid(family, seed=seed).double() for seed in (1, 2))
        x = images(size=(32, 32))
    else:
        changes = {"patch_size": 8} if family == "eva02" else {}
        teacher, student, x = tiny(family, seed=1, **changes), tiny(family, seed=2, **changes), images()
    losses = [{**loss, "weight": 1.0} for loss in losses]
    torch.manual_seed(3)  # of projectors
    expected = (
        DualViT(copy.deepcopy(teacher), copy.deepcopy(student), losses=losses).double()(x).transfer_loss
    )
    torch.manual_seed(3)
    group = dist.group.WORLD
    own = teacher
    teacher = read_once(lambda: own, group, outline_of)
    dual = DualViT(teacher, student, losses=losses).double()
    units = shard_units(teacher)
    before = sum(parameter.numel() for unit in units for parameter in unit.parameters())
    spread = Spread(init_device_mesh("cpu", (2,)), group, {})
    gather_to_run(teacher, dual.teacher_views["teacher"], spread)
    receive(teacher, group)
    found = [dual(x).transfer_loss for _ in range(2)]
    held = [parameter for unit in units for parameter in unit.parameters()]
    after = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in held)
    return {"equal": all(torch.equal(each, expected) for each in found), "share": after / before}


def load_sharded(path: Path, dtype: str) -> dict[str, Any]:
    """Load and shard a teacher on this rank; the most bytes that torch held, and what it read."""
    group = dist.group.WORLD
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        how = TeacherConfig(source=str(path), shard=True, dtype=dtype)  # type: ignore[arg-type]
        loaded = read_once(
            lambda: load_teacher(how, None), group, lambda own: outline_teachers({"": own})[""]
        )
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        spread = Spread(mesh, group, loaded.report.places, DTYPES[dtype])
        for index, unit in enumerate(shard_units(loaded.model)):
            spread.shard(unit, f"blocks.{index}.")
        receive(loaded.model, group)
    files = {file.stat().st_size for file in path.glob("*.safetensors")}
    events = [
        each.nbytes() for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"
    ]
    taken = [nbytes for nbytes in events if abs(nbytes) not in files]  # a mapped file takes no memory
    whole = load_pretrained(path).model.to(DTYPES[dtype])
    block, expected = loaded.model.blocks[1].state_dict(), whole.blocks[1].state_dict()
    return {
        "peak": max(itertools.accumulate(taken)),
        "weights": sum(parameter.nbytes for parameter in whole.parameters()),
        "largest": max(parameter.nbytes for parameter in whole.parameters()),
        "equal": all(torch.equal(block[name].full_tensor(), expected[name]) for name in expected),
        "read": len(spread.stored.places),
        "tensors": len(list(whole.parameters())),
    }


def loads(folder: Path) -> dict[str, Any]:
    """A teacher loaded by four ranks: from one file, and from several as bfloat16."""
    arguments = {**ARGUMENTS, "embed_dim": 128, "depth": 12, "num_classes": 10}
    model = tiny_vit(**arguments)
    how = {"architecture": ARCHITECTURE, "model_args": arguments, "preprocessing": Preprocessing.of(model)}
    kinds = {"fp32": "5GB", "bf16": "2MB"}
    for dtype, size in kinds.items():
        write_student(model, folder / dtype, max_shard_size=size, **how)

    def found() -> dict[str, Any]:
        return {dtype: load_sharded(folder / dtype, dtype) for dtype in kinds}

    return on_ranks(4, folder, found)


def steps(folder: Path) -> dict[str, Any]:
    """The steps of two ranks; what rank 0 found, by family."""
    return on_ranks(2, folder, lambda: [step_results(family, losses) for family, losses in STEPS])


def on_ranks(ranks: int, folder: Path, work: Callable[[], Any]) -> dict[str, Any]:
    """Call `work` in so many processes of a group; their exit codes, and what each returned."""
    (port,) = free_ports(1)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {
                    "RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
                dist.init_process_group("gloo")
                (folder / f"{rank}.json").write_text(json.dumps(work()))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = wait(children)
    ended = [rank for rank, code in enumerate(codes) if code == 0]
    return {"codes": codes, "found": [json.loads((folder / f"{rank}.json").read_text()) for rank in ended]}


def runs(folder: Path) -> dict[str, Any]:
    """A whole run of two ranks with whole teachers, with sharded ones, and with all sharded."""
    teacher, convnext = make_teacher(folder / "teacher"), make_convnext(folder / "convnext")

    def run(name: str, *, shard: bool, fsdp: bool = False) -> RunConfig:
        sections = several_losses(convnext)
        sections["teachers"]["convnext"]["shard"] = shard
        sections["transfer"]["losses"][1] |= {
            "tokens": "both",
            "standardize": "phi_s",
            "standardize_images": 20,
        }
        source = {"source": f"local-dir:{teacher}", "shard": shard}
        return config(folder / name, mode="transfer", teacher=source, engine={"fsdp": fsdp}, **sections)

    codes = [wait(start(run("whole", shard=False), 2)), wait(start(run("sharded", shard=True), 2))]
    codes.append(wait(start(run("all", shard=True, fsdp=True), 2)))
    found = [differences(folder / "whole", folder / "sharded")] if codes[:2] == [[0, 0]] * 2 else []
    return {"codes": codes, "differences": found}


RENAMED = hasattr(dist, "all_gather_single")
COLLECTIVES = {
    "gather": "all_gather_single" if RENAMED else "all_gather_into_tensor",
    "scatter": "reduce_scatter_single" if RENAMED else "reduce_scatter_tensor",
    "reduce": "all_reduce",
}
"""What FSDP2 calls, in this version of torch."""


def on_two_nodes(folder: Path) -> Callable[[int], None]:
    """Let four ranks be two nodes of two, and write down the groups of the collectives in their steps."""

    def spoil(rank: int) -> None:
        os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank % 2)}
        groups: dict[str, list[list[int]]] = {kind: [] for kind in COLLECTIVES}
        step, stepping = Loop._step, [False]

        def counted(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:

            def collective(*arguments: Any, group: Any = None, **keywords: Any) -> Any:
                if stepping[0]:
                    groups[kind].append(dist.get_process_group_ranks(group))
                return real(*arguments, group=group, **keywords)

            return collective

        def watched(self: Loop, batches: Any) -> None:
            stepping[0] = True
            step(self, batches)
            stepping[0] = False
            (folder / f"{rank}.json").write_text(json.dumps(groups))

        for kind, name in COLLECTIVES.items():
            setattr(dist, name, counted(kind, getattr(dist, name)))
        Loop._step = watched  # type: ignore[method-assign]

    return spoil


def nodes(folder: Path) -> dict[str, Any]:
    """A run of four ranks on two nodes, whose teacher and student are sharded within each, and one of one rank."""
    teacher = make_teacher(folder / "teacher")

    def run(name: str, ranks: int) -> RunConfig:
        return config(
            folder / name,
            mode="transfer",
            teacher={"source": f"local-dir:{teacher}", "shard": ranks > 1},
            student={"drop_path": 0.0},
            data={"batch_size": 8 // ranks, "train_samples": 40, "mixup": 0.0},
            optim={"max_steps": 2, "warmup_epochs": 0, "opt": "sgd", "lr": 0.01, "clip_grad": 1.0},
            engine={"fsdp": "node" if ranks > 1 else False},
        )

    codes = wait(start(run("one", 1), 1)) + wait(start(run("nodes", 4), 4, on_two_nodes(folder)))
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]
    return {"codes": codes, "groups": found, "gap": gap(folder / "one", folder / "nodes")}


def main(scenario: str, path: str) -> dict[str, Any]:
    return {"steps": steps, "loads": loads, "nodes": nodes, "runs": runs}[scenario](Path(path))
