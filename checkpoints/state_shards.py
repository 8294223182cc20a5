"""The states of sharded runs through torch.distributed.checkpoint: each process writes its shards beside the training.

A state is a folder with a file of each process (`weight_files.py`). torch plans which process writes and reads which
part of a tensor, so the number of processes and their mesh may differ between the two. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ..models.errors import GraftError, JsonDict
from .report import Place
from .state import TrainingState, write_state
from .weight_files import SHARD_NAME, Piece, map_part


class ShardWriter(StorageWriter, AsyncStager):
    """Write the parts of `tensors` into the files of `folder`, and then call `commit` in the first process.

    `meta` is the JSON part of the state, of which the first process writes its own. `copies` is what the writer before
    has copied, whose memory is used again: to take new memory from the system takes longer than to copy.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        folder: Path,
        meta: JsonDict,
        commit: Callable[[], None],
        rank: int,
        processes: int,
        copies: dict[str, Tensor],
    ) -> None:
        self.tensors, self.copies = tensors, copies
        self.path = folder / SHARD_NAME.format(rank, processes)
        self.meta, self.commit, self.rank = meta, commit, rank

    @torch.no_grad()
    def stage(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the tensors, because training changes them while they are written.

        torch is given an empty state: of each value in one it asks first whether it makes a state of its own, which
        takes longer than to copy.
        """
        for name, tensor in self.tensors.items():
            copied = self.copies.get(name)
            if copied is not None and copied.shape == tensor.shape:  # sums of losses start empty
                _local(copied).copy_(_local(tensor))
            else:
                self.copies[name] = tensor.detach().to("cpu", copy=True)
        return {name: self.copies[name] for name in self.tensors}

    def synchronize_staging(self) -> None:
        """Do nothing: the copies are there."""

    def close(self) -> None:
        """Do nothing: the copies go with the writer."""

    def reset(self, checkpoint_id: object = None) -> None:
        """Do nothing: a writer writes one state."""

    def set_up_storage_writer(self, is_coordinator: bool, *arguments: Any, **keywords: Any) -> None:
        """Make the folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's file, whole or not at all. Raises WriteFailedError as `write_state`."""
        tensors: dict[str, Tensor] = {}
        pieces: JsonDict = {}
        for item in plan.items:
            name, data = item.index.fqn, item.tensor_data
            assert data is not None
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            tensors[name] = tensor
            pieces[name] = [list(data.chunk.offsets), list(data.size)]
        known = json.dumps([self.meta["config"], self.meta["position"]["step"]], sort_keys=True)
        meta = {"pieces": pieces, "state": hashlib.sha256(known.encode()).hexdigest()}
        meta |= {"whole": self.meta} if self.rank == 0 else {}
        write_state(self.path, TrainingState(tensors, meta))
        return _done([WriteResult(item.index, 0, self.path.name) for item in plan.items])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Give the state its name: every process has written its file."""
        self.commit()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Return True: the path is checked where the state gets its name."""
        return True


class ShardReader(StorageReader):
    """Read the parts of a state's tensors that this process needs."""

    def __init__(self, folder: Path, pieces: list[Piece]) -> None:
        self.folder, self.pieces = folder, pieces
        self._files = {MetadataIndex(each.name, each.offset): each.file for each in pieces}

    def reset(self, checkpoint_id: object = None) -> None:
        """Do nothing: a reader reads one state."""

    def read_metadata(self, *arguments: Any, **keywords: Any) -> Metadata:
        """Return what the state holds, in torch's words."""
        found: dict[str, Any] = {}
        for each in self.pieces:
            properties = TensorProperties(dtype=each.dtype)
            whole = found.setdefault(each.name, TensorStorageMetadata(properties, torch.Size(each.whole), []))
            whole.chunks.append(ChunkStorageMetadata(torch.Size(each.offset), torch.Size(each.shape)))
        return Metadata(found)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *arguments: Any, **keywords: Any
    ) -> None:
        """Do nothing: the parts are known."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the parts of the plan into the tensors that wait for them."""
        for item in plan.items:
            index = item.storage_index
            ends = (first + size for first, size in zip(item.storage_offsets, item.lengths, strict=True))
            place = Place(str(self.folder / self._files[index]), index.fqn)
            part = map_part(place, *map(slice, item.storage_offsets, ends))
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Return True: the state was checked when it was found."""
        return True


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class Saving:
    """A state that is being written beside the training."""

    def __init__(self, writer: ShardWriter, group: dist.ProcessGroup) -> None:
        self._written: Any = async_save({}, storage_writer=writer, process_group=group)

    def wait(self) -> None:
        """Wait until the state is on the disk. Raises on every process what one process met, with exit code 1."""
        try:
            self._written.result()
        except CheckpointException as failure:
            found = [error for error, _ in failure.failures.values() if isinstance(error, GraftError)]
            if not found:
                raise
            found[0].exit_code = 1
            raise found[0] from failure


def read_into(
    places: dict[str, Tensor], folder: Path, pieces: list[Piece], group: dist.ProcessGroup | None
) -> None:
    """Read the tensors of a state into `places`, sharded as they are there. All processes must call it."""
    load(places, storage_reader=ShardReader(folder, pieces), process_group=group)
