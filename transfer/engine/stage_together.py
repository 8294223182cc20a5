"""Stage data for all processes of a run: one process per node copies, and the others wait."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import cast

import torch.distributed as dist

from ...models.errors import GraftError
from ..config import DataConfig
from ..staging.copy_data_set import StagingStoppedError
from ..staging.stage import stage
from .parallel import gather, raise_together

PATIENCE = timedelta(days=7)
"""How long processes wait for the slowest node. If a process dies, the waiting ends immediately."""


def stage_together(
    config: DataConfig, group: dist.ProcessGroup | None, stopped: Callable[[], bool] = lambda: False
) -> DataConfig:
    """Return the settings that read the copy on this process's node; `config` itself without staging.

    All processes of `group` must call it. If one is told to stop, all return, possibly without a copy.
    An error of one process is raised on all.
    """
    if config.stage is None:
        return config
    if group is None:
        staged, error = _try(config, stopped)
        if error is not None:
            raise error
        return staged
    waiting = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
    try:
        return _on_each_node(config, waiting, stopped)
    finally:
        dist.destroy_process_group(waiting)


def _on_each_node(config: DataConfig, group: dist.ProcessGroup, stopped: Callable[[], bool]) -> DataConfig:
    nodes = gather((socket.gethostname(), os.environ.get("SLURMD_NODENAME", "")), group)
    rank = dist.get_rank()
    first = nodes.index(nodes[rank])
    staged, error = _try(config, stopped) if rank == first else (config, None)
    raise_together(error, group)
    return gather(staged, group)[first]


def _try(config: DataConfig, stopped: Callable[[], bool]) -> tuple[DataConfig, GraftError | None]:
    try:
        return stage(config, stopped), None
    except StagingStoppedError:
        return config, None
    except GraftError as error:
        return config, error
