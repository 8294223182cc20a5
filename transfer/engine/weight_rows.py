"""Weights of which each process has its rows alone: drawn, read from a file or received, and then sharded with FSDP2.

A student is built with parameters that are cut when their modules register them. Random numbers are drawn whole, one
tensor at a time, and cut, so they are those of a whole student; what else fills a parameter, fills its rows. A starting
weight is read from its file, the rows of this process alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ...checkpoints.report import Place
from ...checkpoints.weight_files import digest_header, map_part
from ..config import RunConfig
from .parallel import from_first, gather, local, student_mesh


def rows_of(tensor: Tensor, mesh: DeviceMesh) -> slice:
    """Return the rows of `tensor` that this process has, as FSDP2 divides them over the last dimension of `mesh`."""
    each = -(-len(tensor) // mesh.size(mesh.ndim - 1))
    start = min(len(tensor), mesh.get_local_rank(mesh.ndim - 1) * each)
    return slice(start, min(len(tensor), start + each))


def join_rows(rows: Tensor, mesh: DeviceMesh, whole: Tensor) -> DTensor:
    """Return the tensor of the shape of `whole` of which each process has its `rows`."""
    kinds = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    return DTensor.from_local(rows, mesh, kinds, run_check=False, shape=whole.shape, stride=whole.stride())


def find_student_mesh(
    config: RunConfig, accelerator: Accelerator, group: dist.ProcessGroup | None
) -> DeviceMesh | None:
    """Return the processes as a mesh, each of which makes its rows of the student; None where each makes all of it.

    A student is made whole that runs before the first step, to fit operators or to match heads, and one whose
    adapters are merged into its weights at the end.
    """
    matches = config.facts.transfers and any(term.heads == "match" for term in config.transfer.terms)
    if not config.engine.fsdp or config.student.calibrate or matches or config.optim.lora is not None:
        return None
    return student_mesh(config.engine, accelerator, group, "cpu")


class _WholeDraws(TorchDispatchMode):
    """Fill the rows of a cut tensor with those of the random numbers that fill a whole one."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        filled = args[0] if args else None
        if not isinstance(filled, DTensor) or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        whole = func(torch.empty(filled.shape, dtype=filled.dtype), *args[1:], **(kwargs or {}))
        local(filled).copy_(whole[rows_of(filled, filled.device_mesh)])
        return filled


@contextmanager
def filling_rows() -> Iterator[None]:
    """Let what initializes cut parameters inside give them the rows of whole ones."""
    with implicit_replication(), _WholeDraws():
        yield


@contextmanager
def cut_parameters(mesh: DeviceMesh) -> Iterator[None]:
    """Build the models inside with this process's rows of each parameter; buffers are whole.

    It is entered within `filling_rows`, once for all: torch's part of that would end with an inner one.
    """

    # The type of what a hook returns is wrong in torch: None alone.
    def cut(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or isinstance(parameter, DTensor) or not parameter.ndim:
            return parameter
        rows = parameter.detach()[rows_of(parameter, mesh)].clone()
        return nn.Parameter(join_rows(rows, mesh, parameter), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(cut)
    try:
        yield
    finally:
        hook.remove()


class StoredWeights:
    """Weights by name, in files that every process can open, or in the first process of `group`.

    The first one sends those that lie in no file, or in one that another process does not see, one at a time.
    """

    def __init__(self, places: Mapping[str, Place], group: dist.ProcessGroup | None) -> None:
        self.group = group
        files = sorted({place.path for place in places.values()})
        first, *others = gather([digest_header(path) for path in files], group)
        reached = None not in first and all(found == first for found in others)
        self.places: Mapping[str, Place] = places if reached else {}

    def read(self, name: str, held: Tensor, *rows: slice) -> Tensor:
        """Return the rows of a tensor, which other processes than the first one may hold as an outline.

        All processes must call it.
        """
        place = self.places.get(name)
        return from_first(held, self.group)[rows] if place is None else map_part(place, *rows)


@torch.no_grad()
def fill(model: nn.Module, held: Mapping[str, Tensor], stored: StoredWeights) -> None:
    """Copy weights into the tensors of a model, or into this process's rows of them. All processes must call it."""
    tensors = model.state_dict()
    for name in (name for name in held if name in tensors):
        own = tensors[name]
        rows = [rows_of(own, own.device_mesh)] if isinstance(own, DTensor) else []
        local(own).copy_(stored.read(name, held[name], *rows))


def shard(task: nn.Module, units: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard `task` in place with FSDP2, each of `units` on its own and the rest together.

    Over a mesh of one dimension, each process has a shard; over (nodes, processes), nodes replicate what they shard.
    Parameters that are cut are sharded as they are: the rows of a process are its shard. The root is also resharded
    after its forward pass, so that the next one gathers shards that were changed (averaged weights in evaluation).
    """
    cut = {name: each for name, each in task.named_parameters() if isinstance(each, DTensor)}
    outline(task, cut)
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(task, mesh=mesh, reshard_after_forward=True)
    give_rows(task, mesh, {name: each.to_local().to(mesh.device_type) for name, each in cut.items()})
    register_fsdp_forward_method(task, "predict")


def outline(module: nn.Module, held: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Put parameters that have a shape and no memory in the places of those that are `held`, by name."""
    for name, each in held.items():
        _put(module, name, torch.empty(each.shape, dtype=dtype or each.dtype, device="meta"))


def give_rows(module: nn.Module, mesh: DeviceMesh, rows: Mapping[str, Tensor]) -> None:
    """Give sharded parameters, which are outlines, this process's rows, by name."""
    for name, each in rows.items():
        _put(module, name, join_rows(each, mesh, module.get_parameter(name)))


def _put(module: nn.Module, name: str, values: Tensor) -> None:
    """Put a parameter in the place of another one."""
    owner, _, own = name.rpartition(".")
    learns = module.get_parameter(name).requires_grad
    module.get_submodule(owner).register_parameter(own, nn.Parameter(values, learns))
