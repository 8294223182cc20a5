"""The header of a safetensors file, checked number by number against the file before a tensor is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...models.errors import CheckpointError
from .extent import count, is_count

MAX_HEADER = 100_000_000
"""The format's own limit in bytes."""
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1), "BOOL": ("bool", 1),
    "C64": ("complex64", 8), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
}  # fmt: skip
"""torch's name and the bytes of one element."""


@dataclass(frozen=True)
class SafeEntry:
    """One tensor of the header."""

    dtype: str
    """torch's name."""
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class SafeHeader:
    """What a safetensors file says that it holds, and does."""

    tensors: dict[str, SafeEntry]
    metadata: dict[str, str]


def read_header(path: Path, file: BinaryIO, size: int) -> SafeHeader:
    """Reads the header alone. `size` is the file's.

    Raises CheckpointError: a length, shape, dtype, offset or name that is not what the format allows, or tensors
    that do not fill the file without holes and overlaps.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER):
        raise CheckpointError(
            f"{path} is damaged: its header would have {length:,} bytes, and the file has {size:,}"
        )
    fields = _parse(path, file.read(length))
    metadata = fields.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} is damaged: the metadata of its header are not text by name")
    spans, tensors = [], {}
    for name, field in fields.items():
        entry, span = _entry(f"{path}: tensor {name[:80]!r}", field)
        tensors[name] = entry
        spans.append((*span, name))
    _check_filled(path, spans, size - 8 - length)
    return SafeHeader(tensors, metadata)


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(header.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_constant)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or no safetensors file: its header is no JSON, {reason}"
        ) from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is damaged: its header is no table of tensors")
    return fields


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of JSON, for `object_pairs_hook`. Raises ValueError: a name is there twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it names {twice[:80]!r} twice")
    return fields


def _no_constant(word: str) -> Any:
    raise ValueError(f"it holds {word}")


def _entry(where: str, field: Any) -> tuple[SafeEntry, tuple[int, int]]:
    if not isinstance(field, Mapping) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is damaged: the header does not give dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        shown = dtype[:20] if isinstance(dtype, str) else type(dtype).__name__
        raise CheckpointError(f"{where} is of an unknown dtype {shown!r}; known are {', '.join(DTYPES)}")
    name, item = DTYPES[dtype]
    nbytes = count(where, shape) * item
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise CheckpointError(f"{where} is damaged: its data_offsets are not two positions in the file")
    start, end = offsets
    if end - start != nbytes:
        raise CheckpointError(
            f"{where} is damaged: its shape and dtype take {nbytes:,} bytes, its data_offsets {end - start:,}"
        )
    return SafeEntry(name, tuple(shape), nbytes), (start, end)


def _check_filled(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """CheckpointError unless the tensors follow each other from the first byte to the last one."""
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            what = "overlaps the one before it" if start < position else "leaves a hole before it"
            raise CheckpointError(f"{path} is damaged: tensor {name[:80]!r} {what}")
        position = end
    if position != size:
        raise CheckpointError(
            f"{path} is damaged: its header names {position:,} bytes of tensors, and the file holds {size:,}"
        )
