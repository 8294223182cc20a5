"""The directory of a zip archive, checked against the file before anything in it is read."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ...models.errors import CheckpointError

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
END, LOCATOR64, END64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sIQI"), struct.Struct("<4sQ2H2I4Q")
MAX_RATIO = 100
ALLOWANCE = 16 << 20
"""Together an archive may unpack to a hundred times its size and 16 MiB; weights hardly compress at all."""


@dataclass(frozen=True)
class Record:
    """One file in the archive."""

    name: str
    start: int
    """Of its bytes in the archive, behind its own header."""
    packed: int
    size: int
    info: zipfile.ZipInfo

    @property
    def is_stored(self) -> bool:
        """Whether its bytes lie in the archive as they are."""
        return self.info.compress_type == zipfile.ZIP_STORED


def read_records(path: Path, file: BinaryIO, size: int) -> dict[str, Record]:
    """The records of a zip archive by name. `size` is the archive's.

    Raises CheckpointError: the directory is damaged, a name leads out of the archive or is there twice, records
    overlap or reach beyond the file, one is encrypted, another reader could find other ones, or together they
    would unpack to far more than the file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        OSError,
        ValueError,
        struct.error,
        UnicodeError,
    ) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{path} is damaged: its zip directory cannot be read, {reason}") from error
    _check_end(path, file, size, directory)
    records: dict[str, Record] = {}
    for info in infos:
        record = _record(path, file, info, directory)
        if record.name in records:
            raise CheckpointError(f"{path} is refused: it holds {record.name[:80]!r} twice")
        records[record.name] = record
    _check_apart(path, records)
    total = sum(record.size for record in records.values())
    if total > MAX_RATIO * size + ALLOWANCE:
        raise CheckpointError(
            f"{path} is refused: its {size:,} bytes would unpack to {total:,}, which no weights do"
        )
    return records


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


def _record(path: Path, file: BinaryIO, info: zipfile.ZipInfo, directory: int) -> Record:
    name = info.orig_filename
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or set(name) & set("\\:\0"):
        raise CheckpointError(f"{path} is refused: it holds the name {name[:80]!r}, which leads out of it")
    if info.flag_bits & 0x1:
        raise CheckpointError(f"{path} is refused: {name[:80]!r} in it is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(
            f"{path} is refused: {name[:80]!r} in it is compressed in a way that no weights are"
        )
    file.seek(info.header_offset)
    fixed = file.read(LOCAL_HEADER.size)
    if len(fixed) < LOCAL_HEADER.size or not fixed.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{path} is damaged: {name[:80]!r} is not where its directory says")
    *_, name_length, extra_length = LOCAL_HEADER.unpack(fixed)
    own = file.read(name_length)
    if own not in (name.encode("utf-8", "replace"), name.encode("cp437", "replace")):
        raise CheckpointError(
            f"{path} is refused: {name[:80]!r} in its directory has another name in its header"
        )
    start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
    if start + info.compress_size > directory:
        raise CheckpointError(f"{path} is damaged: {name[:80]!r} reaches beyond the end of the records")
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        raise CheckpointError(f"{path} is damaged: {name[:80]!r} has two sizes")
    return Record(name, start, info.compress_size, info.file_size, info)


def _check_apart(path: Path, records: dict[str, Record]) -> None:
    end, before = 0, ""
    for record in sorted(records.values(), key=lambda record: record.info.header_offset):
        if record.info.header_offset < end:
            raise CheckpointError(f"{path} is refused: {before[:80]!r} and {record.name[:80]!r} overlap")
        end, before = record.start + record.packed, record.name
