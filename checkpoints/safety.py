"""Check what a file of weights holds (an archive, a pickle, an ONNX graph) before anything is allocated or run."""

from __future__ import annotations

import argparse
import importlib
import io
import math
import mmap
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.serialization import StorageType

from ..models.errors import CheckpointError, install_command
from .files import check_regular, open_regular
from .report import printable

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
        return np.lib.format.read_array(record, allow_pickle=False)


# Rebuild what a torch file describes without its numbers.
#
# `torch.load(weights_only=True)` calls no foreign code, and it takes every size on trust: `torch.FloatTensor(1 << 40)`
# passes, a storage of an old file is allocated as long as the pickle says, and a nested tuple can take years to hash.
# So the pickle is rebuilt first with a stand-in for each name that `torch.save` writes: it takes the same arguments,
# refuses those that torch never writes, and makes tensors on the meta device.

PurePickle: Any = pickle._Unpickler
"""The one in Python: its steps can be replaced, and its memo is no larger than what is in it."""
OPCODES = b"\x80.(N\x88\x89JKM\x8aGUX})]\x8fast\x85\x86\x87eubRQ\x81cqrhj" + b"\x93\x94\x95\x8ciS"
"""The opcodes that torch reads, and the ones by which other pickles name what they would call."""


def rebuild(stream: io.BytesIO) -> tuple[Any, dict[str, int]]:
    """Return what the next pickle in `stream` describes, and the bytes of each storage in it by its key.

    Raises RefusedError if it names what no checkpoint needs, and any other error if it is damaged.
    """
    start = stream.tell()
    if sum(1 for _ in islice(pickletools.genops(stream), MAX_ENTRIES + 1)) > MAX_ENTRIES:
        raise ValueError(f"its pickle describes more than {MAX_ENTRIES:,} entries")
    stream.seek(start)
    outline = _Outline(stream, encoding="utf-8")
    return outline.load(), {key: flat.nbytes for key, flat in outline.storages.items()}


class _Table(dict[Any, Any]):
    """A dictionary, empty at first, whose keys are checked."""

    def __init__(self) -> None:
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        _keys([key])
        super().__setitem__(key, value)


class _Dtype:
    """A numpy dtype of plain numbers."""

    def __init__(self, kind: str, *_: Any) -> None:
        if re.fullmatch("[biuf][1248]", kind) is None:
            raise ValueError("it has a kind of numpy's numbers that is not plain")
        self.dtype = np.dtype(kind)

    def __setstate__(self, state: Any) -> None:
        if state not in [(3, order, None, None, None, -1, -1, 0) for order in "<>|"]:
            raise ValueError("it changes a kind of numpy's numbers")
        self.dtype = self.dtype.newbyteorder(state[1])


def _keys(keys: Any) -> list[Any]:
    """Refuse a key that could take years to hash (a tuple), or of which others have the hash (a large number)."""
    for key in keys:
        is_text = isinstance(key, (str, bytes)) and len(key) <= MAX_NAME
        if not is_text and not (isinstance(key, (int, float)) and abs(key) < 1 << 60) and key is not None:
            raise ValueError(f"it has a key that is no number and no text of {MAX_NAME:,} characters")
    return list(keys)


def _counter(counts: Any) -> _Table:
    if type(counts) is not _Table:
        raise ValueError("it counts what is no table")
    return counts


def _encode(text: str, codec: str) -> bytes:
    if codec not in ("latin1", "latin-1"):  # others are quadratic
        raise ValueError("it encodes a text otherwise than torch")
    return text.encode(codec)


def _tensor(storage: Tensor, offset: int, shape: Any, stride: Any, *_: Any) -> Tensor:
    tensor = storage.as_strided(shape, stride, offset)  # refuses what is negative
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if tensor.numel() and max(last + 1, tensor.numel()) > storage.numel():
        raise ValueError(
            f"a tensor of shape {tuple(shape)} does not fit into {storage.numel():,} numbers"[:160]
        )
    return tensor


def _typed_tensor(
    storage: Tensor, offset: int, shape: Any, stride: Any, _: Any, __: Any, dtype: Any, *___: Any
) -> Tensor:
    return _tensor(storage.view(dtype), offset, shape, stride)


STAND_INS: dict[str, Any] = {
    **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"), _tensor),
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, kind, arguments, state: rebuild(*arguments),
    **dict.fromkeys(("torch.Tensor", "torch.nn.parameter.Parameter")),
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.serialization._get_layout": lambda name: _keys([name]),
    "collections.OrderedDict": _Table,
    "collections.Counter": _counter,
    "builtins.set": _keys,
    "builtins.complex": lambda real, imaginary: real + 1j * imaginary,
    "_codecs.encode": _encode,
    "argparse.Namespace": argparse.Namespace,
    "pathlib.PosixPath": PurePosixPath,
    "numpy.dtype": _Dtype,
    **{
        f"numpy.{core}.multiarray.scalar": lambda kind, data: np.frombuffer(data, kind.dtype)[0]
        for core in ("core", "_core")
    },
}
"""What torch files name, and what is called in its place; None and a dtype cannot be called."""


class _Outline(PurePickle):
    """Rebuilds one pickle."""

    def __init__(self, stream: io.BytesIO, *, encoding: str) -> None:
        super().__init__(stream, encoding=encoding)
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name. Raises RefusedError."""
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full in STAND_INS:
            return STAND_INS[full]
        if module in ("torch", "torch.cuda") and name.endswith("Storage"):
            return StorageType(name).dtype
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise RefusedError(
            f"it holds {printable(full[:120])}, and rebuilding that could run code; "
            "save the weights alone (a state dict) or as .safetensors"
        )

    def persistent_load(self, pid: Any) -> Tensor:
        """Return a storage: ("storage", type, key, device, elements[, None])."""
        _, dtype, key, _, elements, *_ = pid
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or any(pid[5:]):
            raise ValueError("it names a storage of no known type")
        flat = torch.empty(elements, dtype=dtype, device="meta")
        there = self.storages.setdefault(key, flat)
        if there.dtype != dtype or there.numel() != elements:
            raise ValueError(f"its storage {key[:40]!r} is described twice")
        return flat

    def load_empty_dictionary(self) -> None:
        """Begin a dictionary."""
        self.append(_Table())

    def load_build(self) -> None:
        """Give a state to what has one. A tensor has none: it would set its shape again."""
        target, state = self.stack[-2:]
        is_plain = isinstance(target, (_Table, argparse.Namespace)) and isinstance(state, _Table)
        if not is_plain and not isinstance(target, _Dtype):
            raise ValueError("it gives a state to what has none")
        super().load_build()

    dispatch = {code: PurePickle.dispatch[code] for code in OPCODES} | {
        pickle.BUILD[0]: load_build, pickle.EMPTY_DICT[0]: load_empty_dictionary
    }  # fmt: skip


# Read what an ONNX file holds: its float tensors, and which node reads which; nothing in it is run.

MAX_NODES, MAX_INITIALIZERS, MAX_NODE = 200_000, 100_000, 1 << 20
"""Nodes and tensors of a graph, and bytes of one node; a ViT-L has a few thousand nodes of a few kB."""
MAX_FIELDS = 1000
"""Fields of one initializer; as a rule it has five."""
IR_VERSION, GRAPH, METADATA = 1, 7, 14
NODE, INITIALIZER, SPARSE = 1, 5, 15
SCOPES = "pkg.torch.onnx.name_scopes"
QUANTIZED = re.compile(
    r"DequantizeLinear|QLinear\w+|QGemm|QAttention|MatMulInteger\w*|ConvInteger|MatMulNBits"
)


@dataclass(frozen=True)
class Node:
    """An operation of the graph."""

    op: str
    name: str
    module: str
    """Name of the module that it was exported from, as torch's exporters record it; empty where they do not."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    transposed: bool = False
    """Of a Gemm: its matrix is (out, in)."""


@dataclass(frozen=True)
class Graph:
    """What an ONNX file holds."""

    initializers: dict[str, Tensor]
    """Its floating-point tensors."""
    nodes: tuple[Node, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


def is_onnx(head: bytes) -> bool:
    """Return whether bytes begin as an ONNX file: the version of its format, then a part with a length."""
    return len(head) > 2 and head[0] == IR_VERSION << 3 and 0 < head[1] < 64 and head[2] & 7 == 2


def read_onnx(path: Path, file: BinaryIO) -> Graph:
    """Return the float tensors and the nodes of an ONNX file.

    Raises CheckpointError: the package onnx is not installed, or a file of its numbers cannot be read or lies
    outside of its folder. Raises ValueError: it is damaged, quantized, or has more parts than any model.
    """
    onnx: Any = _package(path)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as content:
        parts = list(_fields(content, slice(0, len(content)), MAX_FIELDS))
        graphs = [where for number, where in parts if number == GRAPH]
        if len(graphs) != 1:
            raise ValueError(f"it has {len(graphs)} graphs, and a model has one")
        entry = onnx.StringStringEntryProto
        properties = [
            entry.FromString(bytes(content[where])) for number, where in parts if number == METADATA
        ]
        [graph] = graphs
        found = Graph({}, _nodes(onnx, content, graph), {each.key: each.value for each in properties})
        for name, tensor in _initializers(onnx, path, content, graph):
            if name in found.initializers:
                raise RefusedError(f"two of its tensors have the name {name[:80]!r}")
            found.initializers[name] = tensor
    return found


def _package(path: Path) -> Any:
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise CheckpointError(
            f"{path} is an ONNX file, and to read it needs onnx, not installed: {install_command('export')}"
        ) from error


def _fields(content: memoryview, within: slice, limit: int) -> Iterator[tuple[int, slice]]:
    """Yield number and place of each field with a length; skip numbers. Raises ValueError: it is damaged."""
    at, count = within.start, 0
    while at < within.stop:
        count += 1
        if count > limit:
            raise RefusedError(f"it has more than {limit:,} parts in one place, which no model has")
        key, at = _varint(content, at, within.stop)
        kind, length = key & 7, {1: 8, 5: 4}.get(key & 7, 0)
        if key < 8:  # the parts are numbered from 1
            raise ValueError("a part of it has no number")
        if kind == 0:
            _, at = _varint(content, at, within.stop)
        elif kind == 2:
            length, at = _varint(content, at, within.stop)
        elif kind not in (1, 5):
            raise ValueError("a part of it is of no known kind")
        if length > within.stop - at:
            raise ValueError("it is cut short, or the length of a part is wrong")
        if kind == 2:
            yield key >> 3, slice(at, at + length)
        at += length


def _varint(content: memoryview, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError("it is cut short")
        byte = content[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number in it has no end")


def _nodes(onnx: Any, content: memoryview, graph: slice) -> tuple[Node, ...]:
    """Return the nodes, but for those that hold large constants."""
    nodes = []
    for number, where in _fields(content, graph, MAX_NODES + MAX_INITIALIZERS):
        if number == SPARSE:
            raise RefusedError("it has sparse tensors, which no vision transformer has")
        if number == NODE and where.stop - where.start <= MAX_NODE:
            nodes.append(_node(onnx.NodeProto.FromString(bytes(content[where]))))
        if len(nodes) > MAX_NODES:
            raise RefusedError(f"it has more than {MAX_NODES:,} nodes, which no vision transformer has")
        if nodes and QUANTIZED.fullmatch(nodes[-1].op):
            raise RefusedError(
                f"it is quantized ({nodes[-1].op}): export the model in float32, or give its own weights"
            )
    return tuple(nodes)


def _node(node: Any) -> Node:
    texts = (node.op_type, node.name, *node.input, *node.output)
    if not all(isinstance(text, str) for text in texts):  # protobuf hands over bytes that are no UTF-8
        raise ValueError("a name in it is no text")
    settings = {each.name: each for each in node.attribute} if node.op_type == "Gemm" else {}
    plain = all(settings[name].f == 1 for name in ("alpha", "beta") if name in settings)
    transposed = "transB" in settings and bool(settings["transB"].i)
    module = _module(node) if plain else ""
    return Node(node.op_type, node.name, module, tuple(node.input), tuple(node.output), transposed)


def _module(node: Any) -> str:
    """Return the module of a node: torch's newer exporter lists the scopes, its older one names nodes by them."""
    scopes = next((each.value for each in node.metadata_props if each.key == SCOPES), "")
    if scopes:
        return next(iter(re.findall(r"'([^']*)'", scopes)[-2:-1]), "")
    parts = node.name.split("/")[1:-1]  # "/blocks/blocks.0/attn/qkv/MatMul"
    repeated = {index for index, part in enumerate(parts[1:]) if part.startswith(f"{parts[index]}.")}
    return ".".join(part for index, part in enumerate(parts) if index not in repeated)


def _initializers(onnx: Any, path: Path, content: memoryview, graph: slice) -> Iterator[tuple[str, Tensor]]:
    kinds = onnx.TensorProto
    floats = (kinds.FLOAT, kinds.FLOAT16, kinds.DOUBLE, kinds.BFLOAT16)
    for number, where in _fields(content, graph, MAX_NODES + MAX_INITIALIZERS):
        if number != INITIALIZER:
            continue
        largest = max((w.stop - w.start for _, w in _fields(content, where, MAX_FIELDS)), default=0)
        if where.stop - where.start - largest > MAX_NODE:
            raise RefusedError("a tensor in it has a description of more than a megabyte")
        tensor = kinds.FromString(bytes(content[where]))
        if tensor.data_type in floats:
            yield tensor.name, _tensor_onnx_file(onnx, path, tensor)


def _tensor_onnx_file(onnx: Any, path: Path, tensor: Any) -> Tensor:
    shape = tuple(tensor.dims)
    if not isinstance(tensor.name, str):
        raise ValueError("the name of a tensor in it is no text")
    if len(shape) > 8 or any(side < 0 for side in shape):
        raise ValueError(f"its tensor {tensor.name[:80]!r} has no such shape as {shape[:8]}")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        size = math.prod(shape) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        tensor.raw_data = _beside(path, tensor, size)
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
    array = onnx.numpy_helper.to_array(tensor)  # ValueError where numbers and shape do not agree
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))


def _beside(path: Path, tensor: Any, size: int) -> bytes:
    """Return the numbers of a tensor that are in another file of the folder."""
    said = {each.key: each.value for each in tensor.external_data}
    named, start = said.get("location", ""), int(said.get("offset") or 0)
    file = path.parent / named
    check_regular(file, inside=path.parent)
    with open_regular(file) as data:
        there = data.seek(0, 2)
        if int(said.get("length") or size) != size or not 0 <= start <= there - size:
            raise ValueError(f"its tensor {tensor.name[:80]!r} takes {size:,} bytes, which are not in {file}")
        data.seek(start)
        return data.read(size)
