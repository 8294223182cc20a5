"""Check the directory of a zip archive against the file before anything in it is unpacked."""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ...models.errors import CheckpointError

END, LOCATOR64, END64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sIQI"), struct.Struct("<4sQ2H2I4Q")
MAX_RATIO = 100
ALLOWANCE = 16 << 20
"""Together an archive may unpack to a hundred times its size and 16 MiB; weights hardly compress at all."""
MAX_ARRAY_HEADER = 1 << 16
UNREADABLE = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    OSError,
    ValueError,
    EOFError,
    struct.error,
)


def open_archive(path: Path, file: BinaryIO, size: int) -> zipfile.ZipFile:
    """The archive in `file`, which has `size` bytes, once its directory has been checked.

    Raises CheckpointError: the directory is damaged, another reader could find another one, a name is there twice,
    or the records would unpack to far more than the file.
    """
    try:
        archive = zipfile.ZipFile(file)
        for info in archive.infolist():
            archive.open(info).close()  # compares the record's own header with the directory
    except UNREADABLE as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{path} is damaged: its zip directory cannot be read, {reason}") from error
    _check_end(path, file, size, archive.start_dir)
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if any(one.header_offset + one.compress_size >= other.header_offset for one, other in pairwise(infos)):
        raise CheckpointError(f"{path} is refused: two of the records in it overlap")
    if any(_leads_out(info.orig_filename) for info in infos):
        raise CheckpointError(f"{path} is refused: a name in it leads out of it")
    if len({info.orig_filename.casefold() for info in infos}) < len(infos):  # torch reads names in any case
        raise CheckpointError(f"{path} is refused: two of the names in it are the same")
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in infos):
        raise CheckpointError(f"{path} is refused: it is compressed in a way that no weights are")
    total = sum(info.file_size for info in infos)
    stored = sum(info.file_size for info in infos if info.compress_type == zipfile.ZIP_STORED)
    if stored > size or total > MAX_RATIO * size + ALLOWANCE:
        raise CheckpointError(
            f"{path} is refused: its {size:,} bytes would unpack to {total:,}, which no weights do"
        )
    return archive


def _leads_out(name: str) -> bool:
    pure = PurePosixPath(name)
    return not name or pure.is_absolute() or ".." in pure.parts or bool(set(name) & set("\\:\0"))


def read_record(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """The first `limit` bytes of a record, unpacked. Raises CheckpointError where it is damaged."""
    try:
        with archive.open(info) as stream:
            return stream.read(limit)
    except (*UNREADABLE, zlib.error) as error:
        raise CheckpointError(
            f"{path} is damaged: {info.filename[:80]!r} in it cannot be unpacked"
        ) from error


def outline_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    """An array of an .npz file on the meta device, from its header alone.

    Raises CheckpointError: the header is damaged, or it describes Python objects, another number of bytes than there
    are, or numbers that torch has no type for.
    """
    where = f"{path}: array {info.filename.removesuffix('.npy')[:80]!r}"
    stream = io.BytesIO(read_record(path, archive, info, MAX_ARRAY_HEADER))
    try:
        version = np.lib.format.read_magic(stream)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = reader[version](stream)
    except (
        ValueError,
        KeyError,
        TypeError,
        SyntaxError,
        RecursionError,
        MemoryError,
        OverflowError,
    ) as error:
        raise CheckpointError(f"{where} is damaged: it has no valid header") from error
    if dtype.hasobject:
        raise CheckpointError(
            f"{where} is refused: it holds Python objects, and rebuilding them could run code"
        )
    held, needed = info.file_size - stream.tell(), math.prod(shape) * dtype.itemsize
    if needed != held:
        raise CheckpointError(
            f"{where} is damaged: its shape {tuple(shape)} takes {needed:,} bytes, and it has {held:,}"[:300]
        )
    try:
        return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device="meta")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{where} holds numbers or a shape that torch has no type for: {error}"
        ) from error


def _check_end(path: Path, file: BinaryIO, size: int, directory: int) -> None:
    """CheckpointError unless every reader of zip finds the directory that this one read.

    Python looks for the directory right before the end and torch where the end says; so they must be one place,
    and the end must be the last thing in the file, as torch and numpy write it.
    """
    end = _fields(file, END, size - END.size)
    place, last = end[6], end[7]
    locator = _fields(file, LOCATOR64, size - END.size - LOCATOR64.size)
    if locator[0] == b"PK\x06\x07":
        start = size - END.size - LOCATOR64.size - END64.size
        end64 = _fields(file, END64, start)
        place = end64[9] if locator[2] == start and end64[0] == b"PK\x06\x06" else -1
    if end[0] != b"PK\x05\x06" or last or place != directory:
        raise CheckpointError(f"{path} is refused: its zip directory is not where its end says")


def _fields(file: BinaryIO, layout: struct.Struct, position: int) -> tuple[Any, ...]:
    file.seek(max(0, position))
    return layout.unpack(file.read(layout.size).ljust(layout.size, b"\0"))
