"""What loader processes add to images: a checksum of their pixels, and the targets that were computed of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...models.errors import DataError, JsonDict
from .target_shards import Shard, TargetShards

PIXELS = "pixels"
"""The checksums, beside the targets."""


def add_checksums(
    view: int, indices: Sequence[int], images: Tensor, name: Callable[[int], str]
) -> dict[str, Tensor]:
    """Return a checksum of each of the images (B, C, H, W)."""
    sums = [zlib.crc32(image.contiguous().numpy().data) for image in images]
    return {PIXELS: torch.tensor(sums, dtype=torch.int64)}


class TargetRows:
    """Adds to each image its targets. Files are mapped into memory when they are first needed."""

    def __init__(self, shards: TargetShards) -> None:
        self._shards = shards
        self._opened: dict[Shard, dict[str, Tensor]] = {}

    def __call__(
        self, view: int, indices: Sequence[int], images: Tensor, name: Callable[[int], str]
    ) -> dict[str, Tensor]:
        """Return the targets (B, ...) by name.

        Raises DataError: an image has other pixels than when its targets were computed, or a file cannot be read.
        """
        rows = [self._row(view, index) for index in indices]
        found = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        same = found.pop(PIXELS) == add_checksums(view, indices, images, name)[PIXELS]
        if not bool(same.all()):
            first = indices[int((~same).int().argmax())]
            raise DataError(
                f"{name(first)} is not the image that its targets in transfer.cache were computed of: it was changed, "
                "or another version of Pillow, torchvision or timm makes other pixels of it; remove the folder "
                f"{self._shards.folder}, or name another transfer.cache"
            )
        return found

    def __getstate__(self) -> JsonDict:
        return {**self.__dict__, "_opened": {}}

    def _row(self, view: int, index: int) -> dict[str, Tensor]:
        size = self._shards.shard_size
        first = index // size * size
        shard = Shard(view, first, min(size, self._shards.samples - first))
        if shard not in self._opened:
            self._opened[shard] = self._open(shard)
        return {key: tensor[index - first] for key, tensor in self._opened[shard].items()}

    def _open(self, shard: Shard) -> dict[str, Tensor]:
        path = self._shards.path(shard)
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(f"transfer.cache: {path} cannot be read: {error}") from error
