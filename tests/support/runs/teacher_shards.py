"""Runs and steps with sharded teachers: forks a process a rank. `scenarios.py` calls `main`."""

from __future__ import annotations

import copy
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.parallel import outline_of, read_once, receive
from graftvit.transfer.engine.shard_teachers import gather_to_run, shard_units
from graftvit.transfer.methods.dual import DualViT
from support.hub.ports import free_ports
from support.models.dense import images, tiny
from support.models.pyramids import TINY
from support.models.pyramids import tiny as tiny_pyramid
from support.runs.engine_killer import start, wait
from support.runs.engine_runs import config, differences, make_convnext, make_teacher, several_losses
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

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
    gather_to_run(teacher, dual.teacher_views["teacher"], init_device_mesh("cpu", (2,)), group)
    receive(teacher, group)
    found = [dual(x).transfer_loss for _ in range(2)]
    held = [parameter for unit in units for parameter in unit.parameters()]
    after = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in held)
    return {"equal": all(torch.equal(each, expected) for each in found), "share": after / before}


def steps(folder: Path) -> dict[str, Any]:
    """The steps of two ranks; what rank 0 found, by family."""
    (port,) = free_ports(1)
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {
                    "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
                dist.init_process_group("gloo")
                found = [step_results(family, losses) for family, losses in STEPS]
                torch.save(found, folder / f"{rank}.pt")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = wait(children)
    return {"codes": codes, "found": torch.load(folder / "0.pt") if codes == [0, 0] else []}


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


def main(scenario: str, path: str) -> dict[str, Any]:
    return {"steps": steps, "runs": runs}[scenario](Path(path))
