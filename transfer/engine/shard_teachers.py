"""A frozen teacher whose blocks are spread over the processes with FSDP2, and gathered one by one to run.

A step runs a view of the teacher (`models/copying/teacher_view.py`), whose blocks share their parameters with the
teacher's. So the teacher's blocks are sharded, each as a root of its own, and each block of the view gathers the
weights of its own before it runs. What is outside the blocks (embeddings, head) stays whole on every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ...checkpoints.report import Place
from ...models.copying.teacher_view import TokensOnly, WholeModel
from ...models.families import blocks_of, find_family
from ..config import RunConfig
from .build import DTYPES, Parts
from .parallel import PROCESSES, mesh_of_nodes, receive
from .students import sharded_teachers, teacher_settings
from .weight_rows import StoredWeights, give_rows, outline, rows_of


def shard_teachers(
    config: RunConfig, parts: Parts, accelerator: Accelerator, group: dist.ProcessGroup | None
) -> None:
    """Shard the teachers that `shard` names, each block on its own; each device gets one whole block at a time.

    Each node has all shards, so no gather crosses the network between them. Raises ConfigError as `mesh_of_nodes`.
    """
    sharded, dual = sharded_teachers(config), parts.task.taught_by
    if not sharded or dual is None:
        return
    mesh = mesh_of_nodes(accelerator, group, accelerator.device.type)[PROCESSES]
    for name in sharded:
        teacher, dtype = dual.teachers[name], DTYPES[teacher_settings(config)[name].dtype]
        spread = Spread(mesh, group, parts.teachers[name].report.places, dtype)
        gather_to_run(teacher, dual.teacher_views[name], spread)
        receive(teacher, group, accelerator.device)
        teacher.to(dtype)


class Spread:
    """Shard modules over the processes of a mesh, and read only this process's rows of their parameters."""

    def __init__(
        self,
        mesh: DeviceMesh,
        group: dist.ProcessGroup | None,
        places: Mapping[str, Place],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.mesh, self.group, self.dtype = mesh, group, dtype
        self.stored = StoredWeights(places, group)

    @torch.no_grad()
    def shard(self, unit: nn.Module, prefix: str) -> None:
        """Shard a module whose parameters have the names `prefix`… in its model. All processes must call it."""
        held = dict(unit.named_parameters())
        outline(unit, held, self.dtype)
        receive(unit, self.group)  # buffers alone
        fully_shard(unit, mesh=self.mesh, reshard_after_forward=True)
        give_rows(unit, self.mesh, {name: self._own(prefix + name, each) for name, each in held.items()})

    def _own(self, name: str, held: Tensor) -> Tensor:
        """Return this process's rows of a parameter, on its device."""
        rows = self.stored.read(name, held, rows_of(held, self.mesh))
        return rows.to(self.mesh.device_type, self.dtype, copy=True)


def gather_to_run(teacher: nn.Module, view: nn.Module, spread: Spread) -> None:
    """Shard the blocks of a teacher, and let each block of its view gather the weights of its own to run."""
    names = {module: name for name, module in teacher.named_modules()}
    for unit in shard_units(teacher):
        spread.shard(unit, f"{names[unit]}.")
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


def _gather(runs: nn.Module, owner: Any) -> None:
    """Let the weights of `owner` be whole while `runs` runs, as they are in its own forward pass."""
    assert isinstance(owner, FSDPModule)

    def before(module: nn.Module, inputs: object, keywords: Mapping[str, Tensor]) -> None:
        owner.unshard()

    def after(module: nn.Module, inputs: object, out: object) -> None:
        owner.reshard()

    runs.register_forward_pre_hook(before, with_kwargs=True)
    runs.register_forward_hook(after, always_call=True)
