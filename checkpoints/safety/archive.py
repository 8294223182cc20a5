"""Read the directory of a zip archive, and what of it describes tensors, without unpacking more than that."""

from __future__ import annotations

import argparse
import io
import math
import threading
import zipfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules import module as hooks

# Bound what a constructor may make: stop it when a model outgrows the weights that it is built for.

PARTS_EACH, SPARE_PARTS, MOST_PARTS = 8, 10_000, 200_000
"""Modules, parameters and buffers for each tensor of the weights, and beside that; however many tensors there are."""
SPARE_NUMBERS, MOST_INDICES = 1 << 26, 1 << 29
"""Numbers beside twice those of the weights (positions of larger images), and whole numbers (tables of relative
positions, which lie in no file: a BEiT of 24 layers has 400 million of them at 1,024 pixels)."""


@contextmanager
def bounded(weights: Collection[Tensor]) -> Iterator[None]:
    """Raise ValueError out of a constructor in this thread as soon as what it makes is far more than `weights`."""
    builder, held = threading.get_ident(), sum(tensor.numel() for tensor in weights)
    parts = min(PARTS_EACH * len(weights) + SPARE_PARTS, MOST_PARTS)
    left = {"parts": parts, "numbers": 2 * held + SPARE_NUMBERS, "indices": MOST_INDICES}

    def count(module: nn.Module, name: str, part: nn.Module | Tensor | None) -> None:
        if threading.get_ident() != builder:
            return
        left["parts"] -= 1
        if isinstance(part, Tensor):
            left["numbers" if part.is_floating_point() else "indices"] -= part.numel()
        if min(left.values()) < 0:
            raise ValueError(
                "the model would be far larger than its weights: "
                f"its weights hold {len(weights):,} tensors with {held:,} numbers"
            )

    with ExitStack() as stack:
        for kind in ("parameter", "buffer", "module"):
            stack.callback(getattr(hooks, f"register_module_{kind}_registration_hook")(count).remove)
        yield


# The tree of dictionaries and lists that a file of weights holds, and what is refused of a file.

MAX_ENTRIES, MAX_NAME, MAX_PART = 2_000_000, 1000, 16 << 20
"""Entries of a tree, characters of a path in it, and bytes of its description in a torch file."""


class RefusedError(ValueError):
    """A file that is whole, and means harm; its text says why."""


def children(node: Any) -> dict[Any, Any]:
    """Return what a container holds by name or number; nothing for anything else."""
    if isinstance(node, argparse.Namespace):
        return vars(node)
    return (
        dict(enumerate(node)) if isinstance(node, (list, tuple)) else node if isinstance(node, dict) else {}
    )


def tensors_of(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a tree by their path, names joined by dots.

    Raises ValueError for a tree that is deeper or larger than any checkpoint, or holds itself.
    """
    waiting, seen = [(prefix, tree)], 0
    while waiting:
        path, node = waiting.pop()
        inner = children(node)
        seen += len(inner)
        if len(path) > MAX_NAME or seen > MAX_ENTRIES:
            raise ValueError(
                f"it has more than {MAX_ENTRIES:,} entries, or a path of {MAX_NAME:,} characters"
            )
        if isinstance(node, Tensor):
            yield path, node
        named = [(f"{path}.{name}" if path else str(name), value) for name, value in inner.items()]
        waiting += reversed(named)


MAX_RATIO, ALLOWANCE = 100, 16 << 20
"""Together an archive may unpack to a hundred times its size and 16 MiB; weights hardly compress at all."""


class _Frugal(io.BufferedReader):
    """A file that a lie about a size does not read gigabytes of at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_PART:
            raise ValueError(f"a part of it has more than {MAX_PART:,} bytes")
        return super().read(size)


def open_archive(file: BinaryIO) -> zipfile.ZipFile:
    """Return the archive in `file`, with every name in it once. Raises ValueError or zipfile.BadZipFile."""
    archive = zipfile.ZipFile(_Frugal(io.FileIO(file.fileno(), closefd=False)))
    if len(archive.NameToInfo) < len(archive.infolist()):
        raise RefusedError("two of the names in it are the same")
    return archive


def read_pickle(path: Path, archive: zipfile.ZipFile) -> tuple[io.BytesIO, dict[str, int]]:
    """Return the description in a torch file, and the bytes of each storage by its key.

    Raises ValueError: it is no torch file, a program, compressed, or torch would find other records in it.
    """
    infos = {info.orig_filename: info for info in archive.infolist()}
    prefix = next(iter(infos), "").partition("/")[0] + "/"
    if any(name.startswith((f"{prefix}code/", f"{prefix}constants.pkl")) for name in infos):
        raise RefusedError("it is a TorchScript program, which is code; save the model's state dict")
    if any(info.compress_type or info.file_size != info.compress_size for info in infos.values()):
        raise RefusedError(
            "it was compressed, which torch never does, or its directory is damaged; save it again"
        )
    if f"{prefix}data.pkl" not in infos:
        raise ValueError("it is a zip archive without a data.pkl")
    for info in infos.values():
        archive.open(info).close()  # compares the record's own header with the directory
    pickled = archive.read(f"{prefix}data.pkl")
    reader: Any = torch._C.PyTorchFileReader(str(path))
    found = {prefix + name: name for name in reader.get_all_records()}
    if found.keys() != infos.keys() or reader.get_record("data.pkl") != pickled:
        raise RefusedError("torch and Python find other records in it")
    ends = [(archive.start_dir, ""), *((info.header_offset, name) for name, info in infos.items())]
    for (start, name), (end, _) in pairwise(sorted(ends)):
        is_here = reader.get_record_header_offset(found[name]) == start
        if not is_here or reader.get_record_offset(found[name]) + infos[name].file_size > end:
            raise RefusedError(
                f"its record {name[:80]!r} is not where its directory says, or overlaps another one"
            )
    return io.BytesIO(pickled), {
        name.removeprefix(f"{prefix}data/"): info.file_size for name, info in infos.items()
    }


def read_arrays(archive: zipfile.ZipFile, size: int) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz file of `size` bytes.

    Raises ValueError: it would unpack to far more, or an array in it is damaged or holds Python objects.
    """
    total = sum(info.file_size for info in archive.infolist())
    if total > MAX_RATIO * size + ALLOWANCE:
        raise RefusedError(f"its {size:,} bytes would unpack to {total:,}, which no weights do")
    return {info.filename.removesuffix(".npy"): _array(archive, info) for info in archive.infolist()}


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(info) as record:
        np.lib.format.read_magic(record)
        shape, _, dtype = np.lib.format.read_array_header_1_0(record)
        held, needed = info.file_size - record.tell(), math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise RefusedError(
            f"its array {info.filename[:80]!r} holds Python objects, and to rebuild them could run code"
        )
    if needed != held:
        raise ValueError(f"its array {info.filename[:80]!r} takes {needed:,} bytes, and has {held:,}")
    with archive.open(info) as record:
        array: NDArray[Any] = np.lib.format.read_array(record, allow_pickle=False)
        return array
