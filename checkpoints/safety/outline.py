"""What a file of weights holds, read and checked without making one tensor of it.

The container is told by the first bytes, never by the name. Whatever passes here can be loaded: no name in it makes
more than data, and no size in it is larger than the file.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from ...models.errors import CheckpointError
from ..report import printable
from .archive import Record, read_records
from .extent import count
from .pickle_outline import DamagedPickle, Machine, children
from .regular import open_regular
from .safe_header import SafeEntry, read_header
from .torch_objects import StorageOutline, TensorOutline, find, storage_of

Kind = Literal["safetensors", "torch", "torch (before 1.6)", "npz"]
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
WRONG = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer in place of weights: fetch the file itself (git lfs pull)",
    ),
    (b"<", "a web page or XML in place of weights: download the file itself"),
    (b"{", "JSON in place of weights"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"\x89HDF", "an HDF5 file, which no vision transformer of a known format comes in"),
    (b"\x93NUMPY", "one array of numpy (.npy), which has no names: give an .npz or a state dict"),
)


@dataclass(frozen=True)
class ArrayOutline:
    """One array of an .npz file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Outline:
    """A file as it describes itself."""

    kind: Kind
    tree: dict[Any, Any]
    """Nested dictionaries; tensors are `SafeEntry`, `TensorOutline` or `ArrayOutline`."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Of a .safetensors file."""
    size: int = 0
    """Bytes of the file."""


def outline(path: Path) -> Outline:
    """Reads and checks what `path` describes.

    Raises CheckpointError in one sentence: no regular file, empty, of no known kind, damaged, larger inside than
    outside, or holding what only code could make.
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            found = _outline(path, file, size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    odd = next((name for name, _ in tensors_of(found.tree) if not name.isprintable()), None)
    if odd is not None:
        raise CheckpointError(f"{path} is refused: the name {odd[:80]!r} of a tensor in it is no plain text")
    return found


def _outline(path: Path, file: BinaryIO, size: int) -> Outline:
    head = file.read(64)
    file.seek(0)
    if not head:
        raise CheckpointError(f"{path} is empty")
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= size:
        return _safetensors(path, file, size)
    if head.startswith(b"PK"):
        return _archive(path, file, size)
    if head.startswith(b"\x80"):
        return Outline("torch (before 1.6)", _legacy(path, file, size), size=size)
    for start, words in WRONG:
        if head.lstrip().startswith(start):
            raise CheckpointError(f"{path} is {words}")
    if head[8:9] == b"{":  # the header says that the file is longer than it is
        return _safetensors(path, file, size)
    raise CheckpointError(
        f"{path} is damaged or no file of weights: it is no .safetensors, torch or .npz file"
    )


def _safetensors(path: Path, file: BinaryIO, size: int) -> Outline:
    header = read_header(path, file, size)
    return Outline("safetensors", dict(header.tensors), header.metadata, size)


def _archive(path: Path, file: BinaryIO, size: int) -> Outline:
    records = read_records(path, file, size)
    if records and all(name.endswith(".npy") for name in records):
        with zipfile.ZipFile(file) as archive:
            arrays = {
                name.removesuffix(".npy"): _array(path, archive, record) for name, record in records.items()
            }
        return Outline("npz", arrays, size=size)
    pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path} is damaged or no file of weights: it is a zip archive without a data.pkl"
        )
    prefix = pickles[0].removesuffix("data.pkl")
    if any(name.startswith((f"{prefix}code/", f"{prefix}constants.pkl")) for name in records):
        raise CheckpointError(
            f"{path} is refused: it is a TorchScript program, which is code; save the model's state dict"
        )
    _check_as_torch_writes(path, records)

    def storage(pid: Any) -> StorageOutline:
        found = storage_of(pid)
        record = records.get(f"{prefix}data/{found.key}")
        if record is None or record.size < (found.start + found.elements) * found.dtype.itemsize:
            raise DamagedPickle(f"its storage {found.key[:40]!r} is not there or too short")
        return found

    with zipfile.ZipFile(file) as archive:
        data = _read_record(path, archive, records[pickles[0]])
    return Outline("torch", _tree(path, Machine(io.BytesIO(data), find, storage)), size=size)


def _check_as_torch_writes(path: Path, records: dict[str, Record]) -> None:
    """Torch looks names up without regard to case, and maps records into memory as they are."""
    packed = next((name for name, record in records.items() if not record.is_stored), None)
    if packed is not None:
        raise CheckpointError(
            f"{path} is refused: {packed[:80]!r} in it was compressed, which torch never does; save it again"
        )
    if len({name.casefold() for name in records}) < len(records):
        raise CheckpointError(f"{path} is refused: two of the names in it differ in their case only")


def _read_record(path: Path, archive: zipfile.ZipFile, record: Record, limit: int | None = None) -> bytes:
    """The first `limit` bytes of a record, unpacked; all of them for None."""
    try:
        with archive.open(record.info) as stream:
            return stream.read(record.size if limit is None else min(limit, record.size))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {record.name[:80]!r} in it cannot be unpacked") from error


def _array(path: Path, archive: zipfile.ZipFile, record: Record) -> ArrayOutline:
    where = f"{path}: array {record.name.removesuffix('.npy')[:80]!r}"
    stream = io.BytesIO(_read_record(path, archive, record, 1 << 16))
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
    nbytes = count(where, shape) * dtype.itemsize
    if nbytes != record.size - stream.tell():
        raise CheckpointError(
            f"{where} is damaged: its shape {tuple(shape)} takes {nbytes:,} bytes, and it has "
            f"{record.size - stream.tell():,}"
        )
    return ArrayOutline(str(dtype), tuple(shape), nbytes)


class _Bounded:
    """A file that never gives more than it has, however much is asked for."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def read(self, size: int, /) -> bytes:
        return self.file.read(max(0, min(size, self.size - self.file.tell())))

    def readline(self) -> bytes:
        return self.file.readline()

    def tell(self) -> int:
        return self.file.tell()


def _legacy(path: Path, file: BinaryIO, size: int) -> dict[Any, Any]:
    """torch's format before 1.6: pickles one behind the other, then the numbers of each storage."""
    storages: dict[str, StorageOutline] = {}

    def storage(pid: Any) -> StorageOutline:
        found = storage_of(pid)
        whole = int(pid[4])
        known = storages.setdefault(found.key, StorageOutline(found.key, found.dtype, whole))
        if (known.dtype, known.elements) != (found.dtype, whole):
            raise DamagedPickle(f"its storage {found.key[:40]!r} is described twice")
        return found

    stream = _Bounded(file, size)
    try:
        magic = Machine(stream, find).load()
    except DamagedPickle:
        magic = None
    if magic != LEGACY_MAGIC:
        file.seek(0)
        _tree(path, Machine(stream, find, storage))  # says what it would run, if that is what it would do
        raise CheckpointError(
            f"{path} is a pickle that torch did not write: save a state dict with torch.save"
        )
    plain = Machine(stream, find)
    try:
        plain.load(), plain.load()  # the version, and facts of the machine
        tree = _tree(path, Machine(stream, find, storage))
        keys = Machine(stream, find).load()
    except DamagedPickle as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise CheckpointError(f"{path} is damaged: its list of storages is not that of its tensors")
    for key in keys:
        known = storages[str(key)]
        elements = int.from_bytes(file.read(8), "little")
        end = file.tell() + known.nbytes
        if elements != known.elements or end > size:
            raise CheckpointError(
                f"{path} is damaged: its storage {str(key)[:40]!r} is cut off or of another size"
            )
        file.seek(end)
    return tree


def _tree(path: Path, machine: Machine) -> dict[Any, Any]:
    try:
        tree = machine.load()
    except DamagedPickle as error:
        if machine.foreign:
            raise CheckpointError(refusal(path, next(iter(machine.foreign)))) from error
        raise CheckpointError(f"{path} is damaged or no torch file: {error}") from error
    if machine.foreign:
        raise CheckpointError(refusal(path, next(iter(machine.foreign))))
    if not isinstance(tree, dict):
        kind = "Tensor" if isinstance(tree, TensorOutline) else type(tree).__name__
        raise CheckpointError(f"{path} holds a {kind}, not a dictionary of weights")
    return tree


def refusal(path: Path, name: str) -> str:
    """What is said of a file that holds `name`."""
    return (
        f"{path} is refused: it holds {printable(name[:120])}, and rebuilding that could run code; "
        "save the weights alone (a state dict) or as .safetensors"
    )


def tensors_of(tree: Any, prefix: str = "") -> Iterator[tuple[str, SafeEntry | TensorOutline | ArrayOutline]]:
    """The tensors of a tree by their path, names joined by dots."""
    if isinstance(tree, (SafeEntry, TensorOutline, ArrayOutline)):
        yield prefix, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors_of(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        for index, value in enumerate(children(tree)):
            yield from tensors_of(value, f"{prefix}.{index}" if prefix else str(index))
