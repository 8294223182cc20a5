"""Read what an ONNX file holds: its float tensors, and which node reads which; nothing in it is run.

A file is split by protobuf's wire format first, so that no count or length in it makes more memory than it has bytes.
"""

from __future__ import annotations

import importlib
import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ...models.errors import CheckpointError
from ..files import check_regular, open_regular
from .archive import RefusedError

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
            f"{path} is an ONNX file, and to read it needs onnx, not installed: pip install 'graftvit[export]'"
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
            yield tensor.name, _tensor(onnx, path, tensor)


def _tensor(onnx: Any, path: Path, tensor: Any) -> Tensor:
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
