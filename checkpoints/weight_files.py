"""Read weights files without ever running their content; the bytes determine the container, never the name.

A file is checked before a tensor is read: whatever passes can be loaded, no name in it makes more than data, and no
size in it is larger than the file.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..models.errors import CheckpointError, Json, JsonDict
from .files import check_regular, open_regular, read_regular
from .report import Place, printable, shortened, some
from .safety import (
    MAX_PART,
    Graph,
    RefusedError,
    is_onnx,
    open_archive,
    read_arrays,
    read_onnx,
    read_pickle,
    rebuild,
    tensors_of,
)

_NUMBERS = [np.dtype(kind) for kind in "?bBhHiIlLqQefd"]
_SCALAR = np.float64(0).__reduce__()[0]
PLAIN_OBJECTS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    *{type(dtype) for dtype in _NUMBERS},
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""What training files hold beside tensors, as settings; torch makes these only if it is told to."""
OLD_TORCH = "torch (before 1.6)"
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
class Weights:
    """Weights and all that is known of them and of their model, from a file as it is to tensors under timm's names."""

    tensors: dict[str, Tensor]
    """Under timm's names; empty until they are chosen from the `tree`."""
    origin: str
    """The file, folder or repository, as errors name it."""
    format: str
    """In words, for the report; of a file as it is, its container."""
    architecture: str | None = None
    """timm name; None where the source does not say."""
    model_args: Json = field(default_factory=dict)
    """Keyword arguments of timm's constructor."""
    pretrained_cfg: Json = field(default_factory=dict)
    """timm's description: mean, std, license, classifier, input size."""
    norm_eps: float | None = None
    """The norms' epsilon where the source says one; timm has no argument for it that JSON could hold."""
    revision: str | None = None
    notes: tuple[str, ...] = ()
    """Sentences for the report."""
    provenance: Json = field(default_factory=dict)
    """The provenance of a student of this package: teacher, recipe, results (`provenance.py`)."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Keys of the source that its format has no use for, and why."""
    fresh: tuple[str, ...] = ()
    """Modules that the source lacks on purpose, and that stay fresh: the last norm of a backbone."""
    tree: JsonDict = field(default_factory=dict)
    """The content of a file as it is: a tree of dicts of a torch file, flat tensors of others."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of a .safetensors or ONNX file."""
    graph: Graph | None = None
    """Of an ONNX file: which node reads which tensor."""

    @property
    def img_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the weights were trained on, where the source says it."""
        size = self.model_args.get("img_size")
        if size is None and "input_size" in self.pretrained_cfg:
            size = tuple(self.pretrained_cfg["input_size"])[1:]
        return None if size is None else as_pair(size)


def as_pair(size: Any) -> tuple[int, int]:
    """(height, width) from one whole number or two. Raises CheckpointError: it is neither."""
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(side) is int for side in pair):
        raise CheckpointError(
            f"img_size={shortened(size)} is no size in pixels: write one whole number, or height and width"
        )
    return pair[0], pair[1]


def outline(path: Path) -> Weights:
    """Return what a file describes, once it is checked: tensors on the meta device, those of .npz and ONNX as they are.

    Raises CheckpointError in one sentence: no regular file, empty, of no known kind, damaged, larger inside than
    outside, or holding what only code could make.
    """
    try:
        if is_sharded(path):
            return _join_outlines(path)
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


def _outline(path: Path, file: BinaryIO, size: int) -> Weights:
    file.seek(0)
    head = file.read(64)
    file.seek(0)
    wrong = next((words for start, words in WRONG.items() if head.lstrip().startswith(start)), None)
    if not head:
        raise ValueError("it is empty")
    if head[8:9] == b"{" and (wrong is None or int.from_bytes(head[:8], "little") <= size):
        return _safetensors(path)
    if head.startswith(b"\x80"):
        return _legacy(path, io.BytesIO(file.read(MAX_PART)), size)
    if is_onnx(head):
        graph = read_onnx(path, file)
        return Weights(
            {}, str(path), "onnx", tree=dict(graph.initializers), metadata=graph.metadata, graph=graph
        )
    if not head.startswith(b"PK"):
        raise CheckpointError(
            f"{path} is {wrong or 'damaged or no file of weights: it is no .safetensors, torch, .npz or ONNX file'}"
        )
    with open_archive(file) as archive:
        names = archive.namelist()
        if names and all(name.endswith(".npy") for name in names):
            arrays = read_arrays(archive, size)
            tensors = {name: torch.from_numpy(each) for name, each in arrays.items()}
            return Weights({}, str(path), "npz", tree=tensors)
        pickled, sizes = read_pickle(path, archive)
    tree, needed = rebuild(pickled)
    short = next((key for key, nbytes in needed.items() if sizes.get(key, -1) < nbytes), None)
    if short is not None:
        raise ValueError(f"its storage {short[:40]!r} is not there or too short")
    return Weights({}, str(path), "torch", tree=tree)


def _safetensors(path: Path) -> Weights:
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
    return Weights({}, str(path), "safetensors", tree=tensors, metadata=metadata)


def _legacy(path: Path, stream: io.BytesIO, size: int) -> Weights:
    """torch allocates the storages before it looks at what follows the pickles."""
    is_torch = LEGACY_MAGIC in stream.getvalue()[:64]
    rebuild(stream)  # says what it would run, if that is what it would do
    if not is_torch:
        raise ValueError("it is a pickle that torch did not write; save a state dict with torch.save")
    _, _, (tree, sizes), (keys, _) = (rebuild(stream) for _ in LEGACY_PICKLES)
    needed = stream.tell() + sum(8 + nbytes for nbytes in sizes.values())
    if sorted(keys) != sorted(sizes) or needed > size:
        raise ValueError(f"its tensors take {needed:,} bytes, and the file has {size:,}")
    return Weights({}, str(path), OLD_TORCH, tree=tree)


def read_file(path: Path, inside: Path | None = None) -> Weights:
    """Read a .safetensors, torch, .npz or ONNX file.

    What it describes is read and checked first (`outline`). Torch files are pickles: only tensors, plain containers and
    settings (`PLAIN_OBJECTS`) are rebuilt, always by torch's weights-only loading.

    Args:
        inside: the folder that the file must lie in, where its name comes from another file.

    Raises CheckpointError naming the file: as `check_regular` and `outline`.
    """
    if inside is not None:
        check_regular(path, inside)
    described = outline(path)
    if is_state(described.metadata):
        check_digest(path)
    tree = described.tree if described.format in ("npz", "onnx") else read_tree(path, described.format)
    odd = next((name for name, _ in tensors_of(tree) if not name.isprintable()), None)
    if odd is not None:
        raise CheckpointError(f"{path} is refused: the name {odd[:80]!r} of a tensor in it is no plain text")
    return replace(described, tree=tree)


def read_tree(path: Path, kind: str) -> JsonDict:
    """Read a file that was checked; of an archive only those numbers that are used: an optimizer's stay on the disk."""
    if is_sharded(path):
        return _join(path)
    try:
        if kind == "safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            _places.update({tensor: Place(str(path), name) for name, tensor in tensors.items()})
            return tensors
        with torch.serialization.safe_globals(PLAIN_OBJECTS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path} cannot be read: {reason}") from error


# Tensors of a .safetensors file are mapped into memory: none takes any until it is read.

_places: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def find_place(tensor: Tensor) -> Place | None:
    """Return where a tensor that was read lies; None for one that was computed since, or of another kind of file."""
    return _places.get(tensor)


def map_part(place: Place, *ranges: slice) -> Tensor:
    """Return a part of the tensor at a place; what is copied of it is read, and nothing else of its file."""
    with safe_open(place.path, framework="pt") as file:
        part: Tensor = file.get_tensor(place.name)[ranges]
    return part


def digest_header(path: str) -> str | None:
    """Return a digest of the header and size of a file, to compare it between machines; None without a file."""
    try:
        with open_regular(Path(path)) as file:
            header = file.read(8 + int.from_bytes(file.read(8), "little"))
            return hashlib.sha256(header + str(file.seek(0, os.SEEK_END)).encode()).hexdigest()
    except (CheckpointError, OSError):
        return None


# Weights spread over several files with an index, as Hugging Face libraries write them.

INDEX_SUFFIX = ".index.json"


def read_shards(index: Path, find: Callable[[str], Path | None]) -> Weights:
    """Return the tensors that an index lists, each from its file; `find` gives the path of a file by its name.

    Raises CheckpointError: the index is damaged or names files elsewhere, or a file or a tensor is missing.
    """
    names = weight_map(index)
    tree: JsonDict = {}
    for file in dict.fromkeys(names.values()):
        path = find(file)
        if path is None:
            raise CheckpointError(f"{index} lists {file}, which is not there: the weights are not whole")
        held = read_file(path, inside=index.parent).tree
        tree |= {name: tensor for name, tensor in held.items() if names.get(name) == file}
    absent = [name for name in names if name not in tree]
    if absent:
        raise CheckpointError(f"{index} lists {some(absent)}, which its files do not hold")
    return Weights({}, str(index), "shards", tree={name: tree[name] for name in names})


def weight_map(index: Path) -> dict[str, str]:
    """Tensor names to file names, each a plain name in the index's own folder."""
    text = read_regular(index)
    try:
        names = json.loads(text, object_pairs_hook=_unique)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged: it has no weight_map") from error
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(f"{index} is damaged: its weight_map does not name a file for each tensor")
    elsewhere = [file for file in names.values() if not _is_plain(file)]
    if elsewhere:
        raise CheckpointError(f"{index} is refused: it names {elsewhere[0][:80]!r}, outside of its folder")
    return names


def _is_plain(name: str) -> bool:
    return 0 < len(name) < 256 and name not in (".", "..") and not set(name) & set("/\\:\0")


def _unique(pairs: list[tuple[str, Any]]) -> JsonDict:
    """Return a table of JSON. Raises ValueError: a name is there twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name is there twice")
    return fields


# The proof that the state of a run is whole.
#
# The metadata of its safetensors file hold `graftvit.state`, the JSON part, and `sha256`: the digest of the whole file
# with its own 64 characters read as zeros. So one changed byte anywhere is found: in header, names, shapes or tensors.

STATE_KEY = "graftvit.state"
DIGEST_KEY = "sha256"
BLANK = b"0" * 64
_MARK = f'"{DIGEST_KEY}":"'.encode()
_CHUNK = 1 << 22


def is_state(metadata: Mapping[str, str]) -> bool:
    """Return whether the metadata of a file are those of a training state."""
    return STATE_KEY in metadata


def check_digest(path: Path) -> None:
    """Raise CheckpointError for a file of `outline` that was changed since it was written, or that has no digest."""
    if is_sharded(path):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(check_digest, shard_files(path)))
        return
    try:
        with open_regular(path) as file:
            position, digest = compute_digest(path, file)
            file.seek(position)
            if file.read(len(BLANK)) != digest:
                raise CheckpointError(f"{path} is damaged: its {DIGEST_KEY} does not match its content")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def compute_digest(path: Path, file: BinaryIO) -> tuple[int, bytes]:
    """Return where the digest of a file stands, and what it must be.

    Raises CheckpointError: the header of the file has no place for one.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise CheckpointError(f"{path} is damaged: {size} bytes are too few for a safetensors file")
    file.seek(0)
    header = file.read(8 + length)
    found = header.find(_MARK)  # JSON escapes quotes inside strings, so it is there once
    position = found + len(_MARK)
    if found < 0 or position + len(BLANK) > len(header):
        raise CheckpointError(f"{path} is damaged or no training state: its header holds no {DIGEST_KEY}")
    digest = hashlib.sha256(header[:position] + BLANK + header[position + len(BLANK) :])
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return position, digest.hexdigest().encode()


# A state in a folder, of a run whose weights are sharded: a file of each process, with a digest of its own.
#
# Each file is a state whose JSON part says where its tensors lie in the whole ones (`pieces`), of which state it is
# (`state`: a digest of the run's settings and step), and in the first file what the JSON part of the whole state is
# (`whole`). The names of the files say how many there are.

SHARD_NAME = "shard-{:05}-of-{:05}.safetensors"


class Piece(NamedTuple):
    """A part of a tensor, in a file under the name of the whole one."""

    file: str
    name: str
    offset: tuple[int, ...]
    """Its first element in the whole tensor."""
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    """The shape of the whole tensor."""
    dtype: torch.dtype


def is_sharded(path: Path) -> bool:
    """Return whether a path is a folder with the state of a sharded run, or a part of one."""
    return path.is_dir() and any(path.glob("shard-*-of-*.safetensors"))


def shard_files(folder: Path) -> list[Path]:
    """Return the files of a state in a folder. Raises CheckpointError: there are not all, or more."""
    found = sorted(folder.glob("shard-*-of-*.safetensors"))
    if [path.name for path in found] != [SHARD_NAME.format(rank, len(found)) for rank in range(len(found))]:
        raise CheckpointError(f"{folder} is damaged: it has {len(found)} files, not all of one state")
    return found


def read_pieces(folder: Path) -> tuple[list[Piece], JsonDict]:
    """Return the parts of all tensors of a state in a folder, and its JSON part, from the headers of its files.

    Raises CheckpointError: files are missing or damaged, or do not make whole tensors.
    """
    pieces: list[Piece] = []
    whole: JsonDict = {}
    states: set[object] = set()
    for path in shard_files(folder):
        found = outline(path)
        try:
            described = json.loads(found.metadata[STATE_KEY])
            for name, tensor in found.tree.items():
                offset, shape = (tuple(map(int, sizes)) for sizes in described["pieces"][name])
                pieces.append(Piece(path.name, name, offset, tuple(tensor.shape), shape, tensor.dtype))
            whole = described.get("whole", whole)
            states.add(described.get("state"))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged or no part of a state") from error
    if len(states) > 1:
        raise CheckpointError(f"{folder} is damaged: its files are of {len(states)} states")
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)
    wrong = [name for name, parts in by_name.items() if not _make_one(parts)]
    if wrong:
        raise CheckpointError(f"{folder} is damaged: {some(wrong)}: the parts do not make whole tensors")
    return pieces, whole


def _make_one(parts: list[Piece]) -> bool:
    """Return whether parts lie within one tensor and are as large as it."""
    whole, dtype = parts[0].whole, parts[0].dtype
    for part in parts:
        sizes = list(zip(part.offset, part.shape, whole, strict=False))
        inside = all(0 <= first <= first + size <= full for first, size, full in sizes)
        same = (part.whole, part.dtype) == (whole, dtype)
        if not (same and inside and len(part.offset) == len(part.shape) == len(whole)):
            return False
    return sum(math.prod(part.shape) for part in parts) == math.prod(whole)


def _join_outlines(folder: Path) -> Weights:
    pieces, whole = read_pieces(folder)
    tree = {each.name: torch.empty(each.whole, dtype=each.dtype, device="meta") for each in pieces}
    return Weights({}, str(folder), "safetensors", tree=dict(tree), metadata={STATE_KEY: json.dumps(whole)})


def _join(folder: Path) -> JsonDict:
    pieces, _ = read_pieces(folder)
    tree = {each.name: torch.empty(each.whole, dtype=each.dtype) for each in pieces}
    for path in shard_files(folder):
        held = read_tree(path, "safetensors")
        for each in (piece for piece in pieces if piece.file == path.name):
            ends = (first + size for first, size in zip(each.offset, each.shape, strict=True))
            tree[each.name][tuple(map(slice, each.offset, ends))] = held[each.name]
    return dict(tree)
