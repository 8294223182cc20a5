"""The folder of a cache: one file for each range of samples and view, named by what the targets depend on.

    DIR/<digest of all that the targets depend on>/about.json
    DIR/<digest>/view-000/shard-00000.safetensors

A file is written whole or not at all, and holds a digest of itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ...checkpoints.atomic import write_text
from ...checkpoints.files import read_regular
from ...checkpoints.state import TrainingState as Content
from ...checkpoints.state import check_state, read_meta, write_state
from ...models.errors import CheckpointError, ConfigError, JsonDict
from .shard_lock import write_once

logger = logging.getLogger(__name__)

LARGEST_SHARD, SMALLEST_SHARD, SHARDS = 4096, 256, 64
"""Samples of a shard, and how many shards a small set is divided into."""
ABOUT = "about.json"


class Shard(NamedTuple):
    """A range of samples in one view."""

    view: int
    first: int
    size: int


def digest_of(described: JsonDict) -> str:
    """Return the name of what is described as plain data."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TargetShards:
    """The targets of one set of images by one set of teachers."""

    root: Path
    """`transfer.cache`."""
    described: JsonDict
    """All that the targets depend on."""
    samples: int

    @property
    def folder(self) -> Path:
        """The folder of these targets alone."""
        return self.root / digest_of(self.described)

    @property
    def shard_size(self) -> int:
        """Samples of each shard but the last."""
        return min(LARGEST_SHARD, max(SMALLEST_SHARD, -(-self.samples // SHARDS)))

    def shards(self, views: Iterable[int]) -> list[Shard]:
        """Return all shards of some views."""
        size = self.shard_size
        return [
            Shard(view, first, min(size, self.samples - first))
            for view in views
            for first in range(0, self.samples, size)
        ]

    def path(self, shard: Shard) -> Path:
        """Return the file of a shard."""
        number = shard.first // self.shard_size
        return self.folder / f"view-{shard.view:03d}" / f"shard-{number:05d}.safetensors"

    def open(self) -> None:
        """Make the folder and say in it what it is of.

        A damaged description is written again: each shard says itself what it is of.

        Raises ConfigError: the folder says that it is of something else. WriteFailedError: it cannot be written.
        """
        path = self.folder / ABOUT
        text = json.dumps({"samples": self.samples, "shard": self.shard_size, **self.described}, indent=1)
        write_once(path, text)
        try:
            found = read_regular(path, errors="replace")
        except CheckpointError as error:
            raise ConfigError(f"transfer.cache: {error}") from error
        if found == text:
            return
        if _is_json(found):
            raise ConfigError(
                f"transfer.cache: {path} describes other targets: remove the folder {self.folder}, and they are "
                "computed again"
            )
        logger.warning("transfer.cache: %s is damaged; it is written again", path)
        write_text(path, text)

    def unsound(self, shards: Iterable[Shard]) -> list[Shard]:
        """Return the shards that are missing or damaged; name each damaged one in the log."""
        faults = {shard: self.fault(shard) for shard in shards}
        for shard, fault in faults.items():
            if fault is not None and self.path(shard).exists():
                logger.warning("transfer.cache: %s; its targets are computed again", fault)
        return [shard for shard, fault in faults.items() if fault is not None]

    def fault(self, shard: Shard) -> str | None:
        """Return why the file of a shard cannot be used; None if it is there and whole: its digest is computed."""
        path = self.path(shard)
        if not path.exists():
            return f"{path} is missing"
        try:
            check_state(path)
            return None if read_meta(path) == self._meta(shard) else f"{path} is not of these images"
        except CheckpointError as error:
            return str(error)

    def write(self, shard: Shard, tensors: Mapping[str, Tensor]) -> None:
        """Write the targets of a shard, whole or not at all. Raises WriteFailedError as `write_state`."""
        write_state(self.path(shard), Content(dict(tensors), self._meta(shard)))

    def _meta(self, shard: Shard) -> JsonDict:
        return {"targets": self.folder.name, **shard._asdict()}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
