"""Find the container of a file of weights, and check that every size in it fits the file, before a tensor is made.

The first bytes tell the container, never the name. Whatever passes here can be loaded: no name in it makes more than
data, and no size in it is larger than the file.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...models.errors import CheckpointError
from ..regular_files import check_regular, open_regular
from ..report import printable
from .archive import open_archive, outline_array, read_record
from .pickle_scan import DamagedPickle, PickleScan

Kind = Literal["safetensors", "torch", "torch (before 1.6)", "npz"]
MAX_PICKLE = 64 << 20
"""Bytes of the description of a torch file; a model of a thousand layers has two of a million."""
LEGACY_PICKLES = ("magic number", "version", "machine", "tree", "storages")
"""The pickles of a torch file before 1.6, one behind the other; the numbers follow."""
LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
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
class Outline:
    """A file that can be loaded."""

    kind: Kind
    size: int
    """Bytes of the file."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """On the meta device; of a torch file, none."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Of a .safetensors file."""


def outline(path: Path) -> Outline:
    """Checks what `path` describes.

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
    check_names(path, found.tensors)
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a .safetensors file, whose tensors fill it.

    Raises CheckpointError: no regular file, or damaged.
    """
    return _safetensors(path, check_regular(path).stat().st_size).metadata


def check_names(path: Path, names: Mapping[str, object]) -> None:
    """Raises CheckpointError for a name that could write more than text to a terminal."""
    odd = next((name for name in names if not name.isprintable()), None)
    if odd is not None:
        raise CheckpointError(f"{path} is refused: the name {odd[:80]!r} of a tensor in it is no plain text")


def _outline(path: Path, file: BinaryIO, size: int) -> Outline:
    head = file.read(64)
    if not head:
        raise CheckpointError(f"{path} is empty")
    is_header = head[8:9] == b"{"
    if is_header and int.from_bytes(head[:8], "little") <= size:
        return _safetensors(path, size)
    if head.startswith(b"PK"):
        return _archive(path, file, size)
    if head.startswith(b"\x80"):
        return _legacy(path, file, size)
    for start, words in WRONG:
        if head.lstrip().startswith(start):
            raise CheckpointError(f"{path} is {words}")
    if is_header:  # the header says that the file is longer than it is
        return _safetensors(path, size)
    raise CheckpointError(
        f"{path} is damaged or no file of weights: it is no .safetensors, torch or .npz file"
    )


def _safetensors(path: Path, size: int) -> Outline:
    """The library checks the header against the file when it opens it."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            described = {name: (DTYPES[part.get_dtype()], part.get_shape()) for name, part in slices.items()}
            metadata = file.metadata() or {}
        tensors = {
            name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in described.items()
        }
    except KeyError as error:
        raise CheckpointError(
            f"{path} holds numbers of an unknown dtype {error}; known are {', '.join(DTYPES)}"
        ) from error
    except MemoryError as error:
        raise CheckpointError(
            f"{path} cannot be read: its {size:,} bytes need more memory than there is"
        ) from error
    except (SafetensorError, ValueError, RuntimeError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{path} is damaged or no safetensors file: {reason[:300]}") from error
    return Outline("safetensors", size, tensors, metadata)


def _archive(path: Path, file: BinaryIO, size: int) -> Outline:
    with open_archive(path, file, size) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        if infos and all(name.endswith(".npy") for name in infos):
            arrays = {
                name.removesuffix(".npy"): outline_array(path, archive, info) for name, info in infos.items()
            }
            return Outline("npz", size, arrays)
        pickles = [name for name in infos if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{path} is damaged or no file of weights: it is a zip archive without a data.pkl"
            )
        prefix = pickles[0].removesuffix("data.pkl")
        if any(name.startswith((f"{prefix}code/", f"{prefix}constants.pkl")) for name in infos):
            raise CheckpointError(
                f"{path} is refused: it is a TorchScript program, which is code; save the model's state dict"
            )
        if any(info.compress_type for info in infos.values()):
            raise CheckpointError(
                f"{path} is refused: it was compressed, which torch never does; save it again"
            )
        stream = io.BytesIO(read_record(path, archive, infos[pickles[0]], MAX_PICKLE))
    scan = PickleScan()
    _scan(path, scan, stream)
    for storage in scan.storages.values():
        record = infos.get(f"{prefix}data/{storage.key}")
        if record is None or record.file_size < storage.nbytes:
            raise CheckpointError(
                f"{path} is damaged: its storage {storage.key[:40]!r} is not there or too short"
            )
    return Outline("torch", size)


def _legacy(path: Path, file: BinaryIO, size: int) -> Outline:
    """torch allocates each storage as its pickle says, before it looks at what follows the pickles."""
    file.seek(0)
    stream = io.BytesIO(file.read(MAX_PICKLE))
    scan = PickleScan()
    if LEGACY_MAGIC not in stream.getvalue()[:64]:
        _scan(path, scan, stream)  # says what it would run, if that is what it would do
        raise CheckpointError(
            f"{path} is a pickle that torch did not write: save a state dict with torch.save"
        )
    for _ in LEGACY_PICKLES:
        _scan(path, scan, stream)
    needed = stream.tell() + sum(8 + storage.nbytes for storage in scan.storages.values())
    if scan.literals != scan.storages.keys() or needed > size:
        raise CheckpointError(
            f"{path} is damaged: its tensors take {needed:,} bytes, and the file has {size:,}"
        )
    return Outline("torch (before 1.6)", size)


def _scan(path: Path, scan: PickleScan, stream: BinaryIO) -> None:
    damage: DamagedPickle | None = None
    try:
        scan.scan(stream)
    except DamagedPickle as error:
        damage = error
    for name in scan.foreign:
        raise CheckpointError(
            f"{path} is refused: it holds {printable(name[:120])}, and rebuilding that could run code; "
            "save the weights alone (a state dict) or as .safetensors"
        ) from damage
    if damage is not None:
        raise CheckpointError(f"{path} is damaged or no torch file: {damage}") from damage
