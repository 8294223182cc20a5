"""A frozen teacher whose blocks are spread over the processes with FSDP2, and gathered one by one to run.

A step runs a view of the teacher (`models/copying/teacher_view.py`), whose blocks share their parameters with the
teacher's. So the teacher's blocks are sharded, each as a root of its own, and each block of the view gathers the
weights of its own before it runs. What is outside the blocks (embeddings, head) stays whole on every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ...models.copying.teacher_view import TokensOnly, WholeModel
from ...models.families import blocks_of, find_family
from ..config import RunConfig
from .build import Parts
from .parallel import receive
from .students import sharded_teachers


def shard_teachers(
    config: RunConfig, parts: Parts, accelerator: Accelerator, group: dist.ProcessGroup | None
) -> None:
    """Shard the teachers that `shard` names, each block on its own; each device gets one whole block at a time."""
    sharded, dual = sharded_teachers(config), parts.task.taught_by
    if not sharded or dual is None:
        return
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for name in sharded:
        gather_to_run(dual.teachers[name], dual.teacher_views[name], mesh, group)


def gather_to_run(
    teacher: nn.Module, view: nn.Module, mesh: DeviceMesh, group: dist.ProcessGroup | None = None
) -> None:
    """Shard the blocks of a teacher, and let each block of its view gather the weights of its own to run.

    Where the first process of `group` alone has the weights, each block is sent whole, and only its shard is kept.
    """
    for unit in shard_units(teacher):
        receive(unit, group)
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for block, own in _paired_blocks(view, teacher):
        if block is not own:
            _gather(block, own)


def shard_units(teacher: nn.Module) -> list[nn.Module]:
    """Return the modules that are gathered one by one: the blocks, or the innermost parts of lists of modules."""
    if find_family(teacher) is not None:
        return list(blocks_of(teacher))
    lists = [module for module in teacher.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    parts = [part for each in lists for part in each if next(part.parameters(), None) is not None]
    return [part for part in dict.fromkeys(parts) if not _holds_lists(part)]


def _holds_lists(module: nn.Module) -> bool:
    return any(isinstance(each, nn.ModuleList | nn.Sequential) for each in module.modules())


def _paired_blocks(view: nn.Module, teacher: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each block of a view with the teacher's block whose parameters it has."""
    if find_family(teacher) is not None and isinstance(view, TokensOnly | WholeModel):
        yield from zip(blocks_of(view.model), blocks_of(teacher), strict=False)


def _gather(runs: nn.Module, owner: nn.Module) -> None:
    """Let the weights of `owner` be whole while `runs` runs, as they are in its own forward pass."""
    assert isinstance(owner, FSDPModule)
    sharded: Any = owner

    def before(module: nn.Module, inputs: object, keywords: Mapping[str, Tensor]) -> None:
        sharded.unshard()

    def after(module: nn.Module, inputs: object, out: object) -> None:
        sharded.reshard()

    runs.register_forward_pre_hook(before, with_kwargs=True)
    runs.register_forward_hook(after, always_call=True)
