"""Find the container of a file of weights, and check that every size in it fits the file.

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
from safetensors import safe_open

from ...models.errors import CheckpointError, JsonDict
from ..files import open_regular
from ..report import printable
from .archive import MAX_PART, RefusedError, open_archive, read_arrays, read_pickle, tensors_of
from .onnx_file import Graph, is_onnx, read_onnx
from .pickle_outline import rebuild

Kind = Literal["safetensors", "torch", "torch (before 1.6)", "npz", "onnx"]
LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
LEGACY_PICKLES = ("version", "machine", "tree", "storages")
"""The pickles behind the magic number; the numbers follow them."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
WRONG = {
    b"version https://git-lfs": "a Git LFS pointer in place of weights: fetch the file itself (git lfs pull)",
    b"<": "a web page or XML in place of weights: download the file itself",
    b"{": "JSON in place of weights",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "compressed with xz: unpack it first",
    b"\x89HDF": "an HDF5 file, which no vision transformer of a known format comes in",
    b"\x93NUMPY": "one array of numpy (.npy), which has no names: give an .npz or a state dict",
}


@dataclass(frozen=True)
class Outline:
    """A file that can be loaded."""

    kind: Kind
    size: int
    """Bytes of the file."""
    tree: JsonDict
    """Its tensors, on the meta device; those of an .npz or ONNX file as they are."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of a .safetensors or ONNX file."""
    graph: Graph | None = None
    """Of an ONNX file."""


def outline(path: Path) -> Outline:
    """Return what `path` describes, once it is checked.

    Raises CheckpointError in one sentence: no regular file, empty, of no known kind, damaged, larger inside than
    outside, or holding what only code could make.
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            found = _outline(path, file, size)
        for _ in tensors_of(found.tree):  # raises for a tree that is too deep or too large
            pass
    except CheckpointError:
        raise
    except RefusedError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except MemoryError as error:
        raise CheckpointError(
            f"{path} cannot be read: its {size:,} bytes need more memory than there is"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        words = printable(next(iter(str(error).splitlines()), type(error).__name__))[:300]
        raise CheckpointError(f"{path} is damaged or no file of weights: {words}") from error
    if not isinstance(found.tree, dict):
        raise CheckpointError(f"{path} holds a {type(found.tree).__name__}, not a dictionary of weights")
    return found


def _outline(path: Path, file: BinaryIO, size: int) -> Outline:
    file.seek(0)
    head = file.read(64)
    file.seek(0)
    wrong = next((words for start, words in WRONG.items() if head.lstrip().startswith(start)), None)
    if not head:
        raise ValueError("it is empty")
    if head[8:9] == b"{" and (wrong is None or int.from_bytes(head[:8], "little") <= size):
        return _safetensors(path, size)
    if head.startswith(b"\x80"):
        return _legacy(io.BytesIO(file.read(MAX_PART)), size)
    if is_onnx(head):
        graph = read_onnx(path, file)
        return Outline("onnx", size, dict(graph.initializers), graph.metadata, graph)
    if not head.startswith(b"PK"):
        raise CheckpointError(
            f"{path} is {wrong or 'damaged or no file of weights: it is no .safetensors, torch, .npz or ONNX file'}"
        )
    with open_archive(file) as archive:
        names = archive.namelist()
        if names and all(name.endswith(".npy") for name in names):
            arrays = read_arrays(archive, size)
            return Outline("npz", size, {name: torch.from_numpy(each) for name, each in arrays.items()})
        pickled, sizes = read_pickle(path, archive)
    tree, needed = rebuild(pickled)
    short = next((key for key, nbytes in needed.items() if sizes.get(key, -1) < nbytes), None)
    if short is not None:
        raise ValueError(f"its storage {short[:40]!r} is not there or too short")
    return Outline("torch", size, tree)


def _safetensors(path: Path, size: int) -> Outline:
    with safe_open(path, framework="np") as file:  # checks the header against the file
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        described = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
        metadata = file.metadata() or {}
    unknown = sorted({dtype for _, dtype in described.values()} - DTYPES.keys())
    if unknown:
        raise RefusedError(f"it holds numbers of the type {unknown[0]}; known are {', '.join(DTYPES)}")
    tensors = {
        name: torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        for name, (shape, dtype) in described.items()
    }
    return Outline("safetensors", size, tensors, metadata)


def _legacy(stream: io.BytesIO, size: int) -> Outline:
    """torch allocates the storages before it looks at what follows the pickles."""
    is_torch = LEGACY_MAGIC in stream.getvalue()[:64]
    rebuild(stream)  # says what it would run, if that is what it would do
    if not is_torch:
        raise ValueError("it is a pickle that torch did not write; save a state dict with torch.save")
    _, _, (tree, sizes), (keys, _) = (rebuild(stream) for _ in LEGACY_PICKLES)
    needed = stream.tell() + sum(8 + nbytes for nbytes in sizes.values())
    if sorted(keys) != sorted(sizes) or needed > size:
        raise ValueError(f"its tensors take {needed:,} bytes, and the file has {size:,}")
    return Outline("torch (before 1.6)", size, tree)
