"""Processes and devices: accelerate sets up device, precision and DDP; FSDP2 is torch's own `fully_shard`.

accelerate supports FSDP2 only on accelerators (`AcceleratorState` sets a CPU run to MULTI_CPU), so it could not be
tested on a CPU. Our own sharding has one code path for gloo and NCCL, and wraps only the student's blocks: the teacher
is not a child of the task, and is whole on every process unless `shard_teachers.py` shards it.
"""

from __future__ import annotations

import atexit
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from ...models.attention.base import AttentionOperator
from ...models.conversion import forget
from ...models.errors import ConfigError, DataError, GraftError
from ..config import DataConfig, EngineConfig, RunConfig
from ..data.datasets import folders_of
from ..data.image_folder import Found, find_again, number_together, pack_lists, unpack_lists
from .students import check_sharding, sharded_teachers

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
CPU = torch.device("cpu")


def create_accelerator(config: RunConfig) -> Accelerator:
    """Create the accelerate object of this run, with one process unless a launcher set RANK and WORLD_SIZE.

    Raises ConfigError: as `check_placement`.
    """
    # accelerate keeps its state for the life of the process; a second run may use another precision or device.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    several = world_size > 1
    cpu = config.engine.device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=config.engine.device == "cpu" or (several and not torch.cuda.is_available()),
        mixed_precision="no" if config.engine.precision == "fp32" else config.engine.precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=looks_for_unused(config, world_size, cpu=cpu)
            )
        ],
    )
    check_placement(config, accelerator.num_processes, on_cpu=accelerator.device.type == "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.engine.tf32
    if accelerator.num_processes > 1:
        atexit.register(_leave_group)
    return accelerator


def check_placement(config: RunConfig, processes: int, *, on_cpu: bool) -> None:
    """Raise ConfigError if the settings do not fit the processes and the device of the run."""
    engine = config.engine
    if engine.precision == "fp16" and on_cpu:
        raise ConfigError("engine.precision=fp16 needs a GPU: set engine.precision to bf16 or fp32")
    if engine.tf32 and on_cpu:
        raise ConfigError("engine.tf32=true needs a GPU: set it to false")
    check_sharding(config, processes)
    shards = "engine.fsdp" if engine.fsdp else "teacher.shard"
    if on_cpu and (engine.fsdp or sharded_teachers(config)) and not hasattr(torch.cpu.Stream, "record_event"):
        raise ConfigError(
            f"{shards}=true on a CPU needs a newer torch than {torch.__version__}: update torch, or set {shards}=false"
        )
    if not engine.fsdp:
        return
    if processes == 1:
        raise ConfigError(
            f"engine.fsdp={str(engine.fsdp).lower()} shards over processes and this run has one: "
            "start it with torchrun, or set engine.fsdp=false"
        )
    if config.student.compile:
        raise ConfigError("student.compile=true cannot be used with engine.fsdp: set one of them to false")
    if config.facts.aligns:
        raise ConfigError(
            "mode=align runs a student's layers one by one, outside of the blocks that engine.fsdp gathers: "
            "set engine.fsdp=false"
        )


def looks_for_unused(config: RunConfig, world_size: int, *, cpu: bool) -> bool:
    """Return whether DDP must search for unused parameters in each step; torch warns if it finds none.

    Copied layers skip the student's own projections. Without the search, DDP also sorts its buckets again after its
    first step: the order in which three or more gloo ranks add an element depends on its place, so a restart would
    differ by rounding.
    """
    return config.copies or (cpu and world_size > 2)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def host_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """Return a gloo group for decisions between processes without the device; None for one process."""
    if accelerator.num_processes == 1:
        return None
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo"))


NODES, PROCESSES = "nodes", "processes"
"""The dimensions of the mesh of all processes: the nodes, and the processes of a node."""


def node_size(world: int) -> int:
    """Return the number of processes on a node, of `world`: all of them where no launcher says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def mesh_of_nodes(accelerator: Accelerator, group: dist.ProcessGroup | None, device: str) -> DeviceMesh:
    """Return all processes as a mesh (nodes, processes of a node), for tensors on a kind of device.

    Raises ConfigError on every process: nodes have unlike numbers of processes, or these are not numbered in a row.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    size = node_size(world)
    in_a_row = int(os.environ.get("LOCAL_RANK", rank % size)) == rank % size
    sizes = gather(size if in_a_row else 0, group)
    if len({*sizes}) > 1 or not sizes[0] or world % sizes[0]:
        raise ConfigError(
            f"the nodes have {', '.join(map(str, sorted({*sizes})))} processes of {world} (0: not numbered in a row), "
            "and shards need as many on each node: start as many on each, and number them node by node"
        )
    return init_device_mesh(device, (world // size, size), mesh_dim_names=(NODES, PROCESSES))


def student_mesh(
    engine: EngineConfig, accelerator: Accelerator, group: dist.ProcessGroup | None, device: str
) -> DeviceMesh:
    """Return the mesh that `engine.fsdp` shards over: all processes in a row, or with `node` as `mesh_of_nodes`."""
    if engine.fsdp == "node":
        return mesh_of_nodes(accelerator, group, device)
    return init_device_mesh(device, (accelerator.num_processes,))


def check_layers_apart(task: nn.Module) -> None:
    """Raise ConfigError if a layer computes with the parameters of another, which FSDP shards separately."""
    if any(isinstance(module, AttentionOperator) and module.borrows for module in task.modules()):
        raise ConfigError(
            "engine.fsdp shards layer by layer, but with sharing=layerwise a layer uses the parameters of another "
            "one: choose another sharing, or set engine.fsdp=false"
        )


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of `tensor` on the CPU, gathered if it is sharded. All processes must call it in one order."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().cpu()
    # Copy CPU tensors too: training continues while the state is being written.
    return tensor.to("cpu", copy=True)


def gather_each(tensors: Mapping[str, Tensor], *, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Gather one tensor after the other on the CPU, and yield it if `keep`. All processes must exhaust it."""
    for name, tensor in tensors.items():
        if keep:
            yield name, whole(tensor)
        elif isinstance(tensor, DTensor):
            tensor.full_tensor()


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gather the tensors on the CPU and return them if `keep`, else nothing. All processes must call it.

    Only the process that writes keeps them: eight copies of a large state do not fit into one machine.
    """
    return dict(gather_each(tensors, keep=keep))


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of `tensor`, sharing memory. DTensor has no in-place foreach operations."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(value: Tensor, reference: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return `value` with the device, type and sharding of `reference`; the inverse of `whole`.

    Only the first process of `group` needs a value, from which each gets its shard, or all of it: all must call it.
    Each has its own shard of a value that is sharded already.
    """
    if isinstance(value, DTensor):
        return value.to(reference.dtype)
    if not isinstance(reference, DTensor):
        return from_first(value, group).to(device=reference.device, dtype=reference.dtype)
    mine = torch.empty_like(value, device=reference.device) if value.is_meta else value
    moved = mine.to(device=reference.device, dtype=reference.dtype)
    return distribute_tensor(moved, reference.device_mesh, reference.placements)


def gather(item: T, group: dist.ProcessGroup | None) -> list[T]:
    """Return the `item` of every process, by rank, on every process."""
    if group is None:
        return [item]
    items = [item] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def raise_together(error: GraftError | None, group: dist.ProcessGroup | None) -> None:
    """Raise one process's error on every process, so that none waits for the others forever."""
    first = next((found for found in gather(error, group) if found is not None), None)
    if first is not None:
        raise error or first


# Read a file in the first process only. The others get an outline of what it holds, whose tensors have a shape and no
# memory, and then the tensors, one at a time, where they are needed.

PATIENCE = timedelta(days=7)
"""How long processes wait for one that reads or copies a file. If it dies, the waiting ends immediately."""


@contextmanager
def patient(group: dist.ProcessGroup | None) -> Iterator[dist.ProcessGroup | None]:
    """Give a gloo group of all processes to wait for one that reads or copies files; None for one process."""
    if group is None:
        yield None
        return
    waiting = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
    try:
        yield waiting
    finally:
        dist.destroy_process_group(waiting)


def _same(found: T) -> T:
    return found


def read_once(read: Callable[[], T], group: dist.ProcessGroup | None, outline: Callable[[T], T] = _same) -> T:
    """Return what `read` gives in the first process, and to the others its `outline`. All processes must call it.

    All processes continue with the random generator of the first one. Raises its GraftError on every process.
    """
    if group is None:
        return read()
    if dist.get_rank(group):
        answer: list[Any] = [None]
        dist.broadcast_object_list(answer, 0, group)
        error, found, generator = answer[0]
        if error is not None:
            raise error
        torch.set_rng_state(generator)
        return cast(T, found)
    try:
        read_here = read()
    except GraftError as failure:
        dist.broadcast_object_list([(failure, None, None)], 0, group)
        raise
    dist.broadcast_object_list([(None, outline(read_here), torch.get_rng_state())], 0, group)
    return read_here


def from_first(value: Tensor, group: dist.ProcessGroup | None, device: torch.device = CPU) -> Tensor:
    """Return the first process's `value` on every process; the others may have an outline of it.

    All processes must call it, with a tensor of the same shape and type.
    """
    if group is None:
        return value
    if value.is_meta:
        there = torch.empty(value.shape, dtype=value.dtype, device=device)
    else:
        there = value.detach().to(device).contiguous()
    dist.broadcast(there.view(-1).view(torch.uint8), 0, group=group if device.type == "cpu" else None)
    return there


def outline_of(model: M) -> M:
    """Return a copy of a model whose parameters and buffers have a shape and no memory."""
    empty: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        empty[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    forget(model)
    return copy.deepcopy(model, empty)


def receive(model: nn.Module, group: dist.ProcessGroup | None, device: torch.device = CPU) -> None:
    """Give the outlines in `model` the values that the first process has, on `device`, tensor by tensor.

    The tensors stay the same objects, so modules that share them have the values, too. All processes must call it.
    """
    if group is None:
        return
    tensors = [*model.parameters(), *model.buffers()]
    first, *_, last = gather([tensor.is_meta for tensor in tensors], group)
    for tensor, nowhere, missing in zip(tensors, first, last, strict=True):
        if missing and not nowhere:
            value = from_first(tensor, group, device)
            if tensor.is_meta:
                own = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                torch.utils.swap_tensors(tensor, own)


def list_together(
    config: DataConfig, splits: Iterable[str | None], group: dist.ProcessGroup | None, index: Path
) -> list[Found]:
    """Return the images of a folder's splits, which the first process finds for all: in `index`, or in the folders.

    All processes of `group` must call it, and have the same list then, on paths of their own. Raises DataError on all
    of them: one does not see the same splits as the first.
    """
    roots = folders_of(config, splits)
    names = gather([root.name for root in roots], group)
    if any(own != names[0] for own in names):
        rank = next(rank for rank, own in enumerate(names) if own != names[0])
        raise DataError(
            f"rank {rank} sees the folders {names[rank]} of splits in {config.data_path}, and rank 0 {names[0]}: put "
            "data.data_path on a disk that every machine sees"
        )
    found: list[Found] = []

    def find() -> bytes:
        found.extend(find_again(roots, index))
        number_together(found)
        return b"" if group is None else pack_lists(found)

    packed = read_once(find, group) if roots else b""
    return found or (unpack_lists(packed, roots) if roots else [])
